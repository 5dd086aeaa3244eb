"""
The images that this repository names, by digest: ``python deploy/images.py [pin]``.

Without an argument it says what is wrong, and ends with 1 if there is anything: an image that has no digest in
``deploy/images.txt``, one that a file names and the list does not, one that a file names without the list's digest.

``pin`` asks the registries (``docker buildx imagetools inspect``) for what is missing, and writes all digests into the
list and the files. To move to another version: change the tag everywhere, in the list with ``-``, and pin again.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parents[1]
NONE: Final = "-"
# Built from this repository: what runs is what was built.
_OURS: Final = ("otel-correlation-shop", "registry.example.com/")
_NAME: Final = r"[a-z0-9][a-z0-9./-]{0,127}:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_DIGEST: Final = r"sha256:[0-9a-f]{64}"
_REFERENCE: Final = re.compile(
    rf"((?:^|[\s{{,])image: |^FROM )(?P<image>{_NAME})(?:@(?P<digest>{_DIGEST}))?(?=[\s,}}]|$)", re.MULTILINE
)


def files(root: Path) -> list[Path]:
    """
    Return the files that name images.
    """
    found = [root / "docker-compose.yml", *root.glob("deploy/**/*.yaml"), *root.glob("**/Dockerfile")]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))


def listed(root: Path) -> dict[str, str]:
    """
    Return each image of the list with its digest, or ``-``.
    """
    lines = (root / "deploy/images.txt").read_text().splitlines()
    return dict(line.split() for line in lines if line and not line.startswith("#"))


def named(root: Path) -> Iterator[tuple[Path, str, str]]:
    """
    Yield each place that names an image: the file, the image with its tag, the digest or an empty text.
    """
    for path in files(root):
        for found in _REFERENCE.finditer(path.read_text()):
            if not found["image"].startswith(_OURS):
                yield path, found["image"], found["digest"] or ""


def problems(root: Path) -> list[str]:
    """
    Return one line for everything that is not pinned, or not as the list says.
    """
    images = listed(root)
    said = [f"deploy/images.txt: {image} has no digest" for image, digest in images.items() if digest == NONE]
    places = list(named(root))
    for path, image, digest in places:
        place = path.relative_to(root)
        if image not in images:
            said.append(f"{place}: {image} is not in deploy/images.txt")
        elif digest != images[image].replace(NONE, ""):
            said.append(f"{place}: {image} is not written with the digest of deploy/images.txt")
    unused = images.keys() - {image for _, image, _ in places}
    return said + [f"deploy/images.txt: nothing uses {image}" for image in sorted(unused)]


def looked_up(image: str) -> str:
    """
    Return the digest of an image's index, as its registry says.
    """
    command = ["docker", "buildx", "imagetools", "inspect", image, "--format", "{{.Manifest.Digest}}"]
    digest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not re.fullmatch(_DIGEST, digest):
        message = f"{image}: {digest[:100]!r} is no digest"
        raise ValueError(message)
    return digest


def write(root: Path, digests: dict[str, str]) -> None:
    """
    Write digests into the list, and behind the tag of each of these images in the files.
    """
    path = root / "deploy/images.txt"
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        image = line.partition(" ")[0]
        if image in digests:
            lines[number] = f"{image} {digests[image]}"
    path.write_text("\n".join(lines) + "\n")

    def pinned(found: re.Match[str]) -> str:
        digest = digests.get(found["image"])
        return f"{found[1]}{found['image']}@{digest}" if digest else found[0]

    for path in files(root):
        before = path.read_text()
        after = _REFERENCE.sub(pinned, before)
        if after != before:
            path.write_text(after)


def main(arguments: list[str]) -> int:
    """
    Check, or pin and check.
    """
    if arguments == ["pin"]:
        known = listed(ROOT)
        write(ROOT, {image: looked_up(image) if digest == NONE else digest for image, digest in known.items()})
    elif arguments:
        sys.exit(__doc__)
    said = problems(ROOT)
    print("\n".join(said) or "every image is named by its digest")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
