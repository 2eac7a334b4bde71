"""One process that opens damaged checkpoints, case after case, under a limit of address space.

It reads one seed per line from standard input and answers with a line of JSON on a given descriptor. The seed
determines the whole case: the checkpoint, the damage, the way to open it. `fuzz_files.py` starts this process, and
starts another one when it dies.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from scripts.reliability import fuzz_mutations
from scripts.reliability.fuzz_corpus import KINDS

LONGEST_MESSAGE = 300
_WEIGHTS = {"hf": 6, "tokenizer": 3, "gguf": 4, "converted": 4, "quantised": 3, "routers": 3, "adapter": 2}
_NEW_TOKENS = 2
_CONVERTS = 0.25
"""Share of the checkpoints that are converted rather than loaded directly."""
_TEXT = "Steps:\n\n1. It's 12345 \N{GRINNING FACE} caf\N{LATIN SMALL LETTER E WITH ACUTE}"


class Case(NamedTuple):
    """A damaged checkpoint.

    Attributes:
      kind, name: its origin in the corpus.
      folder: its location.
      damage: description of the damage.
      converts: whether it is converted first.
    """

    kind: str
    name: str
    folder: Path
    damage: str
    converts: bool


def make_case(seed: int, corpus: Path, work: Path) -> Case:
    """Makes a seed's case, in an empty folder under `work`."""
    rng = Random(seed)
    kinds = [kind for kind in sorted(KINDS) if (corpus / kind).is_dir()]
    kind = rng.choices(kinds, [_WEIGHTS[k] for k in kinds])[0]
    folders = sorted(path for path in (corpus / kind).iterdir() if path.is_dir())
    chosen, folder = rng.choice(folders), work / "case"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(chosen, folder)
    others = [path for path in folders if path != chosen]
    damage = fuzz_mutations.mutate(rng, folder, others)
    return Case(kind, chosen.name, folder, damage, rng.random() < _CONVERTS)


class Opener:
    """Opens cases; keeps the model that routers and adapters belong to."""

    def __init__(self, corpus: Path) -> None:
        import tide_jax

        self._base = corpus / "base"
        self._adapted = corpus / "hf" / "llama"
        self._model = tide_jax.load(self._base, "float32")
        self._ways: dict[str, Callable[[Case], bool]] = {
            "load": self._load,
            "tokenizer": self._tokenizer,
            "routers": self._routers,
            "adapter": self._adapter,
        }

    def __call__(self, case: Case) -> bool:
        """Opens a case the way its kind requires, and uses it; returns whether all resulting numbers are finite."""
        return self._ways[KINDS[case.kind]](case)

    def _load(self, case: Case) -> bool:
        import tide_jax
        from convert import convert

        files = sorted(case.folder.glob("*.gguf"))
        source = files[0] if files else case.folder
        if case.converts and case.kind != "converted":
            convert(source, case.folder.parent / "out")
            source = case.folder.parent / "out"
        if (case.folder / "tokenizer.json").is_file() and case.kind == "hf":
            _use_tokenizer(tide_jax.load_tokenizer(source))
        return _answers(tide_jax.load(source, "float32"))

    def _tokenizer(self, case: Case) -> bool:
        import tide_jax

        _use_tokenizer(tide_jax.load_tokenizer(case.folder))
        return True

    def _routers(self, case: Case) -> bool:
        import tide_jax

        routers = tide_jax.Routers.load(case.folder / "routers.safetensors", model=self._model)
        return _answers(self._model, routers)

    def _adapter(self, case: Case) -> bool:
        from convert import open_model

        return _answers(open_model(self._adapted, "float32", adapter=case.folder))


def _use_tokenizer(tokenizer: Any) -> None:
    """Converts text to ids and back, with a chat template if there is one."""
    from tide_jax.tokenizer.chat import ChatTemplate

    ids = tokenizer(_TEXT)["input_ids"]
    tokenizer.decode(ids, skip_special_tokens=True)
    if getattr(tokenizer, "chat_template", None):
        ChatTemplate(tokenizer).ids(_TEXT)


def _answers(model: Any, routers: Any = None) -> bool:
    """Generates; returns whether the scores are finite. The engine itself refuses other non-finite numbers."""
    import numpy as np

    import tide_jax

    ids = [[n % model.config.vocab_size for n in (1, 2, 3)]]
    config = tide_jax.ExitConfig(min_layers=0, exit_threshold=0.5) if routers is not None else None
    engine = tide_jax.TIDE(model, routers, config)
    engine.generate(ids, max_new_tokens=_NEW_TOKENS)
    return bool(np.isfinite(np.asarray(model(np.asarray(ids, np.int32)))).all())


def judge(opens: Callable[[], bool]) -> dict[str, Any]:
    """Returns the outcome of a case, and an error's message."""
    from tide_jax.errors import TideError

    try:
        return {"outcome": "accepted" if opens() else "nan"}
    except TideError as error:
        message = str(error)
        if len(message) > LONGEST_MESSAGE or "\n" in message:
            return {"outcome": "refused at length", "length": len(message), "message": message[:400]}
        return {"outcome": "refused", "message": message}
    except MemoryError as error:
        return {"outcome": "memory", "message": _where(error)}
    except BaseException as error:
        full = any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "Out of memory", "bad_alloc"))
        return {"outcome": "memory" if full else "raw", "message": _where(error)}


def _where(error: BaseException) -> str:
    """Class, message and innermost locations of an error, the last one in this project first."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename]
    place = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(ours[-3:]))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} [{place}]"


def _limit(megabytes: int) -> int:
    """Allows so much address space beyond the current use; returns the limit in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return limit


def _prepare(corpus: Path, programs: Path) -> Opener:
    """Imports everything and caches compiled programs: most damaged models need the same programs as intact ones."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    logging.disable(logging.CRITICAL)
    opener = Opener(corpus)
    _answers(opener._model)
    return opener


def main() -> None:
    """Answers seeds until there are no more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--memory", type=int, required=True, help="MiB of address space for the cases")
    parser.add_argument("--answers", type=int, required=True, help="descriptor to write to")
    args = parser.parse_args()
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    opener, stream = _prepare(args.corpus, args.corpus / "programs"), os.fdopen(args.answers, "w", buffering=1)
    limit = _limit(args.memory)
    stream.write(json.dumps({"ready": limit}) + "\n")
    for line in sys.stdin:
        seed, start = int(line), time.perf_counter()
        case = make_case(seed, args.corpus, args.work)
        found = judge(lambda case=case: opener(case))
        about = {"seed": seed, "kind": case.kind, "checkpoint": case.name, "damage": case.damage[:300]}
        stream.write(json.dumps(about | found | {"seconds": round(time.perf_counter() - start, 3)}) + "\n")


if __name__ == "__main__":
    main()
