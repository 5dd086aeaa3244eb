"""
The fast suite on every other supported Python and the oldest packages: ``python -m tests.pythons [3.12 ... oldest]``.

Tests that show the same on every Python (``one_python``) are left to ``make test``.

A Python that the machine has is used as it is. One that only Debian testing has is installed into a folder of its own by
``debootstrap``, once, and the suite runs there by ``chroot``, on the checkout itself; that needs root on a Debian machine.
``python -m tests.pythons --only 3.15 COMMAND ...`` runs any command there. Where a Python cannot be had, one line says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.stack.build import StackError, locked

ROOT = Path(__file__).parent.parent
VERSIONS = ("3.12", "3.13", "3.14", "3.15")
OLDEST = "requirements/oldest.txt"
# Quoted as a shell reads it, for make.
ELSEWHERE = '-m "not one_python" tests'
WHEEL = "tests/stack/test_wheel.py"
# What the folder is made of. A change here makes a new folder.
SUITE = "forky"
FROM_SUITE = ("3.14", "3.15")
PACKAGES = ("ca-certificates", "git", "make", *(f"python{version}-venv" for version in FROM_SUITE))
# The suite's Release file says until when it is valid. A mirror can be behind, and that is no reason to test nothing.
APT = ("apt-get", "-qq", "-o", "Acquire::Check-Valid-Until=false", "-o", "APT::Sandbox::User=root")
# The machine's own files that programs in the folder must see: names, certificates, pip's settings.
SHARED_FILES = ("/etc/hosts", "/etc/resolv.conf", "/etc/pip.conf")
SHARED_FOLDERS = ("/etc/ssl/certs", "/usr/local/share/ca-certificates")


@dataclass(frozen=True, slots=True)
class Python:
    """
    One interpreter: its program, and the folder to ``chroot`` into where it is not the machine's own.
    """

    version: str
    program: str
    folder: Path | None = None

    def command(self, *words: str) -> list[str]:
        """
        Return the command that runs ``words`` in the checkout, where this interpreter is.
        """
        if self.folder is None:
            return list(words)
        return ["unshare", "--mount", "sh", "-euc", _ENTER, "sh", *map(str, (self.folder, ROOT, _git())), *words]

    def environment(self) -> dict[str, str]:
        """
        Return the environment of its commands: the machine's, without its paths where the folder has others.
        """
        variables = dict(os.environ)
        variables.pop("MAKEFLAGS", None)
        if self.folder is not None:
            variables["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            variables["HOME"] = "/root"
            variables.pop("PIP_FIND_LINKS", None)  # It names a folder of the machine.
        return variables

    def where(self) -> str:
        """
        Say where the interpreter comes from.
        """
        return self.program if self.folder is None else f"{self.program} of Debian {SUITE}"


# $1: the folder, $2: the checkout, $3: its git directory, which is outside of it in a worktree. The mounts are this command's
# alone and end with it.
_ENTER = f"""
folder=$1 checkout=$2 git=$3
shift 3
mount --rbind /dev "$folder/dev"
mount -t proc proc "$folder/proc"
mount --rbind /sys "$folder/sys"
for shared in {" ".join(SHARED_FOLDERS)} "$git" "$checkout"; do
    if [ -d "$shared" ]; then mkdir -p "$folder$shared"; mount --rbind "$shared" "$folder$shared"; fi
done
exec chroot "$folder" sh -euc 'cd "$0"; exec "$@"' "$checkout" "$@"
"""


def _git() -> str:
    said = subprocess.run(
        ["git", "rev-parse", "--path-format=absolute", "--git-common-dir"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return said.stdout.strip()


def find(version: str) -> Python:
    """
    Return this version of Python, the machine's own or Debian testing's.

    Raises:
        StackError: It cannot be had here; why.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for candidate in (f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python3"), reverse=True))):
        if _is(version, candidate):
            return Python(version, candidate)
    if version not in FROM_SUITE:
        raise StackError(f"this machine has no Python {version}")
    return Python(version, f"/usr/bin/python{version}", _folder())


def _is(version: str, candidate: str) -> bool:
    """
    Tell whether a program is that Python. A pyenv shim may exist and not run.
    """
    if shutil.which(candidate) is None:
        return False
    asked = [candidate, "-c", "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == version


def _folder() -> Path:
    """
    Return the folder with Debian testing's Pythons, made first where no stamp says that it is there.

    Raises:
        StackError: The machine cannot make or enter one; why.
    """
    recipe = json.dumps([SUITE, PACKAGES, APT]).encode()
    name = f"{SUITE}-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if os.geteuid() or shutil.which("apt-get") is None:
        raise StackError("Debian testing's Pythons need a Debian machine and root")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        raise StackError("this machine allows no mounts, which a folder with Debian testing's Pythons needs")
    with locked("pythons") as directory:
        final, log = directory / name, directory / f"{name}.log"
        if not (final / "stamp.json").exists():
            _make(final, log)
        for file in map(Path, SHARED_FILES):
            if file.exists():
                shutil.copy(file, final / file.relative_to("/"))
    return final


def _make(final: Path, log: Path) -> None:
    """
    Make the folder, complete or not at all.
    """
    say(f"installing Python {' and '.join(FROM_SUITE)} of Debian {SUITE} into {final} (once; minutes)")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pythons-", dir=final.parent) as scratch:
        new = Path(scratch) / "root"
        if shutil.which("debootstrap") is None:
            _run(["apt-get", "update", "-qq"], log)
            _run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", "debootstrap"], log)
        # An older debootstrap does not know the suite's name; its script is that of every suite after bookworm.
        script = "/usr/share/debootstrap/scripts/sid"
        _run(["debootstrap", "--variant=minbase", SUITE, str(new), "", script], log)
        for file in map(Path, SHARED_FILES):
            if file.exists():
                shutil.copy(file, new / file.relative_to("/"))
        _run(["chroot", str(new), *APT, "update"], log)
        _run(["chroot", str(new), *APT, "install", "-y", "--no-install-recommends", *PACKAGES], log)
        seconds = round(time.monotonic() - started, 1)
        (new / "stamp.json").write_text(json.dumps({"suite": SUITE, "packages": PACKAGES, "seconds": seconds}) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        new.rename(final)
    say(f"installed in {seconds} s")


def _run(command: list[str], log: Path) -> None:
    with log.open("ab") as output:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
        code = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        ).returncode
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise StackError(f"{command[0]} failed with status {code}: {last[0]} (all of it: {log})")


def test(job: str) -> tuple[str, bool]:
    """
    Run the fast suite and the wheel's tests once; their output goes to a file. Return a line on it, and whether it failed.
    """
    venv = f".venv-{job}"
    words = ["make", "test", f"VENV={venv}", f"TESTS={ELSEWHERE}"]
    try:
        if job == "oldest":
            python, title = Python("", ""), "The oldest supported packages"
            words.append(f"REQUIREMENTS={OLDEST}")
        else:
            python = find(job)
            title = f"Python {job} ({python.where()})"
            words[-1] += f" {WHEEL}"
            words.append(f"PYTHON={python.program}")
    except StackError as error:
        return f"Python {job}: not tested: {error}", False
    log = ROOT / f"{venv}.log"
    say(f"{title}: the fast suite; its output is in {log.name}")
    with log.open("wb") as output:
        code = subprocess.run(
            python.command(*words), cwd=ROOT, env=python.environment(), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    text = log.read_text(errors="replace")
    summaries = re.findall(r"^=+ (.* in .*) =+$", text, re.MULTILINE)
    ended = summaries[-1] if summaries else "no summary"
    if code:
        print(text[-20_000:], flush=True)
        ended += f"; make ended with status {code}"
    return f"{title}: {ended}", bool(code)


def say(line: str) -> None:
    """
    Tell of progress.
    """
    print(f"pythons: {line}", file=sys.stderr, flush=True)


def main(words: list[str]) -> int:
    """
    Do what the command line says; return the status, 1 where a suite failed.
    """
    if words[:1] == ["--only"]:
        python = find(words[1])
        command = python.command(*words[2:])
        return subprocess.run(command, cwd=ROOT, env=python.environment(), check=False).returncode
    if words == ["--get"]:
        for version in VERSIONS:
            with contextlib.suppress(StackError):  # The suite of that version says it.
                find(version)
        return 0
    results = [test(job) for job in words or (*VERSIONS, "oldest")]
    for line, _ in results:
        print(line, flush=True)
    return int(any(failed for _, failed in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
