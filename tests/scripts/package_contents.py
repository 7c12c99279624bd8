"""What is in the wheel and in the source distribution, for `make test-package`: `python package_contents.py dist`."""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[2]


def tracked(*folders: str) -> set[str]:
    """The files of the repository, as git knows them."""
    names = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    return {name for name in names if name}


def wheel_files(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def check(dist: Path) -> None:
    (wheel_path,), (sdist_path,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    wheel = wheel_files(wheel_path)
    package = {name for name in wheel if ".dist-info/" not in name}
    wanted = tracked("trl_promptkd")
    assert package == wanted, f"the wheel differs from the package's files: {sorted(package ^ wanted)}"
    assert {"trl_promptkd/py.typed", "trl_promptkd/metrics/modules/gsm8k.py"} <= package
    (metadata,) = (content.decode() for name, content in wheel.items() if name.endswith(".dist-info/METADATA"))
    assert "Requires-Dist: trl" in metadata
    assert any(name.endswith("/licenses/LICENSE") for name in wheel)

    with tarfile.open(sdist_path) as archive, tempfile.TemporaryDirectory() as folder:
        files = {name.partition("/")[2] for name in archive.getnames()}
        wanted = tracked("trl_promptkd", "tests", "docs", "examples")
        wanted |= {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"}
        assert wanted <= files, f"the source distribution lacks {sorted(wanted - files)}"
        assert not any(name.startswith(("dist/", "build/", ".venv", "quickstart/")) for name in files)
        archive.extractall(folder, filter="data")
        (source,) = Path(folder).iterdir()
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(source)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (again,) = Path(folder).glob("*.whl")
        assert wheel_files(again) == wheel, "the source distribution builds another wheel"
    print(f"{wheel_path.name}: {len(package)} files; {sdist_path.name}: {len(files)} files; both make the same wheel.")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
