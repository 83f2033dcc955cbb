"""The law of names: words with two meanings, or with a better name, do not come back."""

import io
import re
import tokenize
from collections.abc import Sequence

from syntax import Source

VOCABULARY = (  # old word, as a pattern over a whole identifier, and the word that took its place
    (r"max_sequences", "max_num_seqs"),
    (r"max_lanes", "max_num_batched_tokens"),
    (r"kv_memory", "kv_cache_memory_bytes"),
    (r"page_size", "block_size"),
    (r"prefix_caching", "enable_prefix_caching"),
    (r"prefill_chunk", "chunked_prefill_size"),
    (r"_?(least|most|longest)_\w+|\w+_at_most", "min_ or max_"),
    (r"_?(MOST|LEAST|LONGEST)_\w+", "MIN_ or MAX_"),
    (r"least|most", "minimum or maximum"),
    (r"Track", "SequenceState"),
    (r"KVAccess", "AttentionBackend"),
    (r"Packing|packing", "RaggedBatch, ragged"),
    (r"Flight", "DeviceDecoder"),
    (r"Burst|burst", "MultiStepScheduler, num_scheduler_steps"),
    (r"Placement", "ExecutionBackend"),
    (r"Passes", "RecursionSpec"),
    (r"Runner", "ModelRunner"),
    (r"Lanes|lanes", "AttentionMetadata, metadata"),
    (r"LANES", "SIMD_WIDTH"),
    (r"_tick", "_step"),
    (r"outer|outer_\w+|\w+_outer", "unshared"),
    (r"presence|presences|presence_of", "depth_fractions"),
    (r"kv_len", "context_lens"),
    (r"write_cell|write_slot", "slot_cells, slot_offsets"),
    (r"has_work", "has_unfinished"),
    (r"\w*([Qq]uantis|[Ii]nitialis|[Pp]enalis|[Ss]ummaris|[Tt]okenis|[Uu]tilis)\w*", "-ize"),
    (r"\w*[Cc]olour\w*", "color"),
)
ABOUT_WORDS = frozenset(("tests/vocabulary.py", "tests/test_laws.py"))


def vocabulary(sources: Sequence[Source]) -> list[str]:
    """No identifier, and no text that is only an identifier, is a word of `VOCABULARY`."""
    found = []
    for source in sources:
        if source.path in ABOUT_WORDS:
            continue
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            if token.type not in (tokenize.NAME, tokenize.STRING):
                continue
            word = token.string.strip("\"'")
            for old, new in VOCABULARY:
                if re.fullmatch(old, word):
                    found.append(source.at(token.start[0], f"{word}: the word here is {new}"))
    return found
