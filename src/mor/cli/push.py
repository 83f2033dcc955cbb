"""`mor push`: a model onto Hugging Face's hub."""

from collections.abc import Sequence

from mor.cli.options.parser import parser
from mor.io.hub import push_to_hub
from mor.terminal.console import console

EXAMPLES = (
    "mor push runs/mor3 owner/mor3 --private",
    "mor push exported/mor3 owner/mor3 --message 'After 20B tokens'",
)


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    p = parser("push", "Upload a model to Hugging Face's hub, as one commit.", EXAMPLES)
    p.add_argument(
        "model", metavar="MODEL", help="checkpoint, run (its newest checkpoint) or exported folder"
    )
    p.add_argument("repository", metavar="OWNER/NAME", help="made if it does not exist")
    p.add_argument("--private", action="store_true", help="if the repository is made, for you only")
    p.add_argument("--message", default="Upload model", help="of the commit")
    options = p.parse_args(args)
    address = push_to_hub(
        options.model, options.repository, private=options.private, message=options.message
    )
    console().print(address, markup=False)
    return 0
