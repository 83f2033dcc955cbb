"""Every law of `laws.py` holds for the tree, and fires on a small source that breaks it."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import dedent

import pytest

import laws
from syntax import Source, read_sources
from vocabulary import vocabulary

ROOT = Path(__file__).resolve().parents[1]
LAWS = (
    laws.file_length,
    laws.function_length,
    laws.core_length,
    laws.folder_size,
    laws.import_circles,
    vocabulary,
    laws.layering,
    laws.printing,
    laws.import_effects,
    laws.mutable_globals,
    laws.config_changes,
    laws.torch_free_bookkeeping,
    laws.annotations,
    laws.docstrings,
    laws.checking_tests,
)
Law = Callable[[Sequence[Source]], list[str]]
BODY_OF_61 = "def f() -> None:\n" + "    pass\n" * 60
BROKEN = (
    (laws.file_length, "tests/a.py", "\n" * 401, "401 lines"),
    (laws.function_length, "src/mor/a.py", BODY_OF_61, "f has 61 lines"),
    (laws.core_length, "src/mor/model/a.py", "x = 1\n" * 3001, "3001 statements"),
    (laws.import_circles, "src/mor/demo.py", "from mor.demo import Demo", "imports itself"),
    (vocabulary, "src/mor/a.py", "most_pages = 1", "min_ or max_"),
    (vocabulary, "tests/a.py", "config = {'max_lanes': 1}", "max_num_batched_tokens"),
    (
        laws.layering,
        "src/mor/errors.py",
        "import mor.yaml_config",
        "errors must not import mor.yaml_config",
    ),
    (laws.layering, "src/mor/ops/a.py", "from mor.model import mor", "must not import mor.model"),
    (laws.layering, "src/mor/ops/a.py", "from ..io import hf", "must not import mor.io.hf"),
    (laws.layering, "src/mor/io/__init__.py", "from .. import engine", "import mor.engine"),
    (laws.layering, "src/mor/engine/a.py", "def f():\n  import mor.train", "mor.train"),
    (laws.layering, "src/mor/train/a.py", "from mor import engine", "import mor.engine"),
    (laws.layering, "src/mor/train/a.py", "from mor import LLM", "must not import mor.LLM"),
    (laws.layering, "src/mor/train/a.py", "import mor", "must not import mor"),
    (laws.layering, "src/mor/eval/a.py", "import mor.bench", "must not import mor.bench"),
    (laws.layering, "src/mor/serve/a.py", "import_module('mor.cli.main')", "import mor.cli.main"),
    (laws.layering, "src/mor/bench/a.py", "if TYPE_CHECKING:\n  import mor.cli", "mor.cli"),
    (laws.layering, "src/mor/utils/a.py", "", "utils has no place"),
    (laws.layering, "src/mor/helpers.py", "", "helpers has no place"),
    (laws.printing, "src/mor/model/a.py", "def f():\n  print(1)", "a.py:2: print outside"),
    (laws.printing, "src/mor/demonstrate.py", "rich.print(1)", "print outside"),
    (laws.import_effects, "src/mor/a.py", "import x\nx.setup()", "a.py:2: a module-level `expr`"),
    (laws.import_effects, "src/mor/io/hf/__init__.py", "other()", "py:1: a module-level"),
    (laws.import_effects, "src/mor/a.py", "register()", "a.py:1: a module-level `expr`"),
    (laws.import_effects, "src/mor/a.py", "for i in ():\n  pass", "`for` runs at import"),
    (laws.import_effects, "src/mor/a.py", "while False:\n  pass", "`while` runs at import"),
    (laws.import_effects, "src/mor/a.py", "with x:\n  y = 1", "`with` runs at import"),
    (laws.import_effects, "src/mor/a.py", "if x:\n  y = 1", "`if` runs at import"),
    (laws.import_effects, "src/mor/a.py", "try:\n  y = 1\nfinally:\n  y = 2", "`try` runs"),
    (laws.import_effects, "src/mor/a.py", "try:\n  y = 1\nexcept OSError:\n  y = 2", "`try` runs"),
    (laws.import_effects, "src/mor/a.py", "try:\n  f()\nexcept ImportError:\n  y = 2", "`expr`"),
    (laws.import_effects, "src/mor/a.py", "if TYPE_CHECKING:\n  f()", "a.py:2: a module-level"),
    (laws.import_effects, "src/mor/a.py", "LIBRARY = load()", "load() runs at import time"),
    (laws.import_effects, "src/mor/a.py", "X = tuple(os.listdir(i) for i in Y)", "os.listdir()"),
    (laws.import_effects, "src/mor/a.py", "X = Path('x').read_text()", "runs at import time"),
    (laws.import_effects, "src/mor/a.py", "os.environ['A'] = '1'", "something else's part"),
    (laws.import_effects, "src/mor/a.py", "torch.backends.fast = True", "something else's part"),
    (laws.import_effects, "src/mor/a.py", "del x", "`delete` runs at import"),
    (laws.mutable_globals, "src/mor/a.py", "x = 1\nCACHE = {}", "a.py:2: CACHE is mutable"),
    (laws.mutable_globals, "src/mor/a.py", "X: list[int] = []", "X is mutable"),
    (laws.mutable_globals, "src/mor/a.py", "X = {i for i in range(3)}", "X is mutable"),
    (laws.mutable_globals, "src/mor/a.py", "X = collections.defaultdict(list)", "X is mutable"),
    (laws.mutable_globals, "src/mor/a.py", "X = (1, [2])", "X is mutable"),
    (laws.mutable_globals, "src/mor/a.py", "X = [0] * 3", "X is mutable"),
    (laws.mutable_globals, "src/mor/a.py", "X = 'a b'.split()", "X is mutable"),
    (laws.mutable_globals, "src/mor/a.py", "X = [] if y else ()", "X is mutable"),
    (laws.mutable_globals, "src/mor/a.py", "try:\n  X = set()\nexcept E:\n  pass", "X is mutable"),
    (laws.mutable_globals, "src/mor/a.py", "def f():\n  global x\n  x = 1", "a.py:2: global x"),
    (laws.config_changes, "src/mor/a.py", "def f():\n  object.__setattr__(c, 'a', 1)", "a.py:2"),
    (laws.config_changes, "src/mor/io/config.py", "@dataclass\nclass C: pass", "frozen dataclass"),
    (
        laws.config_changes,
        "src/mor/io/config.py",
        "@dataclass(slots=True)\nclass C: pass",
        "frozen",
    ),
    (laws.torch_free_bookkeeping, "src/mor/engine/pages.py", "def f():\n  import torch", "py:2"),
    (laws.torch_free_bookkeeping, "src/mor/engine/request.py", "from torch import nn", "py:1"),
    (laws.annotations, "src/mor/a.py", "def f(x) -> None: ...", "f: x has no type"),
    (laws.annotations, "src/mor/a.py", "def f(*x, **y) -> None: ...", "f: x has no type"),
    (laws.annotations, "src/mor/a.py", "def f(*, y) -> None: ...", "f: y has no type"),
    (laws.annotations, "src/mor/a.py", "def f(x: int): ...", "f has no return type"),
    (laws.annotations, "src/mor/a.py", "class A:\n  def f(self, x) -> None: ...", "x has no type"),
    (laws.annotations, "src/mor/a.py", "class A:\n  def __init__(self): ...", "no return type"),
    (laws.annotations, "src/mor/a.py", "class A:\n  @staticmethod\n  def f(x) -> None: ...", "x "),
    (laws.docstrings, "src/mor/model/a.py", "def f(): ...", "f has no docstring"),
    (laws.docstrings, "src/mor/io/a.py", "class A: ...", "A has no docstring"),
    (laws.docstrings, "src/mor/ops/a.py", "class A:\n  'A'\n  def f(self): ...", "f has no doc"),
    (laws.docstrings, "src/mor/ops/a.py", "class A:\n  'A'\n  def __call__(self): ...", "__call__"),
    (laws.checking_tests, "tests/test_a.py", "def test_a():\n  f(1)", "test_a checks nothing"),
    (laws.checking_tests, "tests/io/test_a.py", "class TestA:\n  def test_b(self): f()", "test_b"),
)
SOUND = (
    (laws.file_length, "src/mor/a.py", "\n" * 400),
    (laws.function_length, "tests/a.py", BODY_OF_61.replace("    pass\n", "", 1)),
    (laws.core_length, "src/mor/io/a.py", "x = 1\n" * 3001),
    (laws.core_length, "src/mor/engine/multistep/a.py", "x = 1\n" * 3001),
    (vocabulary, "src/mor/a.py", "x = 1  # at most one, at least none"),
    (laws.core_length, "src/mor/model/a.py", "'''\n" * 2 + "# a\n\n" * 2000),
    (laws.layering, "src/mor/__init__.py", "from mor.serve import app"),
    (laws.layering, "src/mor/cli/a.py", "from mor.demo import Demo\nfrom mor import LLM"),
    (laws.layering, "src/mor/bench/a.py", "import mor.eval.loss, mor.engine, mor.train.optim"),
    (laws.layering, "src/mor/model/a.py", "from . import router\nfrom .. import errors\nimport re"),
    (laws.printing, "src/mor/cli/a.py", "def f():\n  print(1)"),
    (laws.printing, "src/mor/eval/a.py", "def f():\n  return render('print(1)')"),
    (laws.mutable_globals, "src/mor/a.py", "__all__ = ['a']\nX = MappingProxyType({'a': [1]})"),
    (laws.mutable_globals, "src/mor/a.py", "X = frozenset([1])\nclass A:\n  def f(self): y = []"),
    (
        laws.config_changes,
        "src/mor/io/config.py",
        "@dataclass(frozen=True, slots=True)\nclass C: pass",
    ),
    (laws.torch_free_bookkeeping, "src/mor/engine/model_runner.py", "import torch"),
    (
        laws.annotations,
        "src/mor/a.py",
        "class A:\n  @classmethod\n  def f(cls, x: int) -> int: ...",
    ),
    (laws.annotations, "src/mor/a.py", "key = lambda x: x"),
    (laws.docstrings, "src/mor/model/a.py", "def _f(): ...\nclass _A:\n  def f(self): ..."),
    (laws.docstrings, "src/mor/model/a.py", "class A:\n  'A'\n  def __init__(self): ..."),
    (laws.docstrings, "src/mor/bench/a.py", "def f(): ..."),
    (laws.checking_tests, "tests/test_a.py", "def test_a():\n  with pytest.raises(E): f()"),
    (laws.checking_tests, "tests/test_a.py", "def test_a():\n  torch.testing.assert_close(a, b)"),
    (laws.checking_tests, "tests/test_a.py", "def test_a():\n  _check_it(a)\ndef helper(): f()"),
    (laws.checking_tests, "tests/tiny.py", "def test_model(): return 1"),
)
A_MODULE_AS_IT_SHOULD_BE = '''
    """What it is."""

    import re
    from typing import TYPE_CHECKING

    try:
        import triton
    except ImportError:
        triton = None

    if TYPE_CHECKING:
        from collections.abc import Mapping

    __all__ = ["A"]
    LIMIT: int = 2**10
    """A note on the limit."""
    Shape = tuple[int, int]
    NAME = re.compile("[a-z]+")
    TABLE = MappingProxyType({"a": Path(__file__).with_name("b"), "c": lambda: launch()})

    @dataclass(frozen=True)
    class A:
        """What it holds."""

        x: list[int] = field(default_factory=list)

        def __post_init__(self) -> None:
            object.__setattr__(self, "x", tuple(self.x))

    if __name__ == "__main__":
        main()
'''


@pytest.fixture(scope="module")
def tree() -> list[Source]:
    return read_sources(ROOT, "src/mor", "tests")


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_tree_obeys(law: Law, tree: list[Source]) -> None:
    violations = law(tree)
    assert not violations, "\n" + "\n".join(violations)


@pytest.mark.parametrize(("law", "path", "text", "expected"), BROKEN)
def test_a_broken_source_is_found(law: Law, path: str, text: str, expected: str) -> None:
    violations = law([Source("src/mor/demo.py", ""), Source(path, text)])
    assert violations
    assert expected in violations[0]
    assert violations[0].startswith(f"{path}:")


@pytest.mark.parametrize(("law", "path", "text"), SOUND)
def test_a_sound_source_passes(law: Law, path: str, text: str) -> None:
    assert law([Source(path, text)]) == []


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_module_as_it_should_be_passes(law: Law) -> None:
    assert law([Source("src/mor/ops/cpu/kernels.py", dedent(A_MODULE_AS_IT_SHOULD_BE))]) == []


def test_a_full_folder_is_found() -> None:
    tree = [Source(f"src/mor/io/{name}.py", "") for name in "abcdefghijklmnopq"]
    assert laws.folder_size(tree[1:]) == []
    assert laws.folder_size(tree) == [
        "src/mor/io/a.py:1: src/mor/io has 17 modules, 16 are allowed"
    ]


def test_every_law_has_a_source_that_breaks_it() -> None:
    assert {law for law, *_ in BROKEN} | {laws.folder_size} == set(LAWS)


def test_forbidden_words_and_hosts_are_found_in_any_case() -> None:
    words = [f"{host}.org" for host in laws.HOSTS] + ["".join(word) for word in laws.WORDS]
    for word in words:
        source = Source("README.md", f"Fine.\nsee https://{word.upper()}/x\n")
        violations = laws.forbidden_text([source])
        assert len(violations) == 1, word
        assert violations[0].startswith("README.md:2: ")
    assert laws.forbidden_text([Source("README.md", "pip, a pilot, and includes")]) == []


def test_no_file_of_the_project_has_forbidden_text() -> None:
    violations = laws.forbidden_text(_text_files())
    assert not violations, "\n" + "\n".join(violations)


def _text_files() -> list[Source]:
    """All files that git tracks or would track, those that are not text left out."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    command = [git, "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    paths = [path for path in listed.decode().split("\0") if (ROOT / path).is_file()]
    contents = {path: (ROOT / path).read_bytes() for path in paths}
    return [
        Source(path, content.decode("utf-8", errors="replace"))
        for path, content in contents.items()
        if b"\0" not in content[:8192]
    ]
