"""What the benchmarks share: child processes, alternated timing, memory, tables and JSON.

Standard library only: a peer runs in an interpreter that may have neither memjax nor JAX. A parent
imports no more than this either, so that it is small and takes no processor time while children are
timed.
"""

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
MIB = 2**20


class ChildError(RuntimeError):
    """A child process failed; the message has the end of what it wrote."""


class MissingError(ChildError):
    """A child's interpreter lacks a package."""


class Child:
    """A process that holds one contender, ready to run, and waits without work between requests.

    Args:
        script: file of this folder that calls `serve`.
        spec: what to build, as plain data.
        python: the interpreter.
    Attributes:
        info: what the child told about itself when it was ready.
    Raises:
        MissingError, ChildError: it did not get ready.
    """

    def __init__(self, script: str, spec: Mapping[str, Any], *, python: str = sys.executable):
        self.name = script
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115, close() closes it
        try:
            self.process = subprocess.Popen(
                [python, str(HERE / script), json.dumps(spec)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            )  # fmt: skip
        except OSError as error:
            self.errors.close()
            raise ChildError(f"cannot start {python}: {error.strerror}") from error
        try:
            self.info = self._reply()
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """The child's answer; it works only while it is asked."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: _reply tells how
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if line:
            reply = json.loads(line)
            if "missing" in reply:
                raise MissingError(reply["missing"])
            return reply
        status = self.process.wait()
        self.errors.seek(0)
        last = "".join(self.errors.readlines()[-20:]).strip()
        raise ChildError(f"{self.name} ended with status {status}:\n{last}")

    def close(self) -> None:
        """Lets the child end."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def serve(build: Callable[[dict], tuple[dict, Callable[..., dict]]]) -> None:
    """The child's side: builds once, then answers requests until there are no more.

    Args:
        build: `spec -> (info, answer)`, with `answer(**request)` a dict. An ImportError in it is
            reported as a missing package.
    """
    try:
        spec = json.loads(sys.argv[1])
    except (IndexError, json.JSONDecodeError):
        name = pathlib.Path(sys.argv[0]).name
        sys.exit(f"{name} is a child process of the benchmarks beside it, which start it; see them")
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be read as a reply
    try:
        info, answer = build(spec)
    except ImportError as error:
        replies.write(json.dumps({"missing": str(error)}) + "\n")
        return
    replies.write(json.dumps(info) + "\n")
    for line in sys.stdin:
        replies.write(json.dumps(answer(**json.loads(line))) + "\n")


def timed(step: Callable[[], Any], tokens: int, watched: "Memory") -> Callable[..., dict]:
    """The answer of a child that measures speed and memory.

    Args:
        step: what is timed; it returns when it is done.
        tokens: that a step reads.
        watched: memory since before the first step.
    Returns:
        `answer(steps=n)`, which gives steps, tokens, seconds and the memory so far.
    """

    def answer(steps: int) -> dict[str, Any]:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        seconds = time.perf_counter() - began
        return {
            "steps": steps,
            "tokens": steps * tokens,
            "seconds": seconds,
            "growth": watched.growth(),
            "largest": largest(),
        }

    return answer


def alternate(
    contenders: Mapping[str, Callable[[], dict]], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Calls all contenders once a round, every second round in reverse, so that drift hits all.

    Args:
        contenders: name -> a call that measures once.
        rounds: how often.
    Returns:
        name -> what its calls returned, in order.
    """
    results: dict[str, list[dict]] = {name: [] for name in contenders}
    for r in range(rounds):
        for name in list(contenders)[:: -1 if r % 2 else 1]:
            results[name].append(contenders[name]())
    return results


def rate(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Tokens per second of samples that hold `tokens` and `seconds`: median, least and most."""
    rates = [sample["tokens"] / sample["seconds"] for sample in samples]
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}


def limit_threads(threads: int) -> None:
    """This process and its children use `threads` processors.

    Raises:
        ValueError: there are fewer.
    """
    # JAX sizes its thread pool by NPROC and by the processors it may run on, torch by OMP.
    for name in ("NPROC", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        if len(mine) < threads:
            raise ValueError(f"--threads={threads}, but there are {len(mine)} processors")
        os.sched_setaffinity(0, mine[:threads])


def _status(field: str) -> int | None:
    """A field of /proc/self/status, in bytes; None where there is no such file."""
    try:
        text = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024 if field in lines else None


def largest() -> int:
    """The process's largest resident size so far (ru_maxrss), in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Memory:
    """Resident memory from now on: `growth()` is the peak since, less what was held then.

    What was freed is first given back to the system, and the kernel's peak is reset where it can be
    (Linux): else a step could hide in what compilation had used.
    """

    def __init__(self):
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)
        try:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            self.exact = True
        except OSError:
            self.exact = False
        self.before = _status("VmRSS") or largest()

    def growth(self) -> int:
        """Bytes."""
        peak = _status("VmHWM") if self.exact else None
        return max(0, (peak or largest()) - self.before)


def versions(*names: str) -> dict[str, str]:
    """Versions of this interpreter and of installed distributions."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "cpu": cpu,
        "processors": os.cpu_count(),
        "system": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def report(name: str, args: argparse.Namespace, **parts: Any) -> dict[str, Any]:
    """The head that every benchmark's JSON has, and its own parts."""
    return {
        "benchmark": name,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine(),
        "compilation_cache": os.environ.get("JAX_COMPILATION_CACHE_DIR"),
        "settings": vars(args),
        **parts,
    }


def _commit() -> str | None:
    """The commit that ran, "+" where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def head(result: Mapping[str, Any]) -> str:
    """Machine and date, and what makes figures doubtful, to print above the table."""
    where = result["machine"]
    line = f"{where['cpu']}, {result['settings']['threads']} threads, {result['date']}"
    if where["load_before"] > 0.5:
        line += f"\nNote: the machine was busy before the start (load {where['load_before']})."
    if result["compilation_cache"]:
        line += "\nNote: JAX_COMPILATION_CACHE_DIR is set, so compile s may be the time of a read."
    return line


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; columns of numbers are aligned right, a cell of None is a dash."""
    cells = [["–" if cell is None else str(cell) for cell in row] for row in rows]
    columns = list(zip(titles, *cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    numeric = [
        all(isinstance(row[i], int | float | None) or row[i][:1].isdigit() for row in rows)
        for i in range(len(titles))
    ]

    def line(row):
        padded = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numeric, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = ("-" * (w - 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True))
    return "\n".join([line(titles), "| " + " | ".join(rule) + " |", *map(line, cells)])


def write(path: str, result: Mapping[str, Any]) -> None:
    """Writes the JSON, in folders made as needed, and says where."""
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {file}")


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def integers(text: str) -> list[int]:
    """Comma-separated integers of at least 1, for argparse."""
    return [positive(part) for part in text.split(",")]


def parser(document: str, name: str, smoke: Mapping[str, Any]) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have.

    Args:
        document: the script's docstring.
        name: of the benchmark.
        smoke: what --smoke sets.
    """
    made = argparse.ArgumentParser(
        description=document, formatter_class=_Formatter, allow_abbrev=False
    )
    made.add_argument("--threads", type=positive, default=2, help="of every child process")
    made.add_argument("--rounds", type=positive, default=7, help="samples, the median counts")
    made.add_argument("--out", default=f"runs/benchmarks/{name}.json", help="where the JSON goes")
    short = " ".join(
        f"--{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in smoke.items()
    )
    made.add_argument(
        "--smoke", action="store_true", help=f"only to see that it runs, in seconds: {short}"
    )
    return made


def parse(
    made: argparse.ArgumentParser, smoke: Mapping[str, Any], argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parses flags; --smoke changes defaults, so that other flags still count."""
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        made.set_defaults(**smoke)
    return made.parse_args(argv)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the docstring and shows defaults."""
