#!/bin/sh
# Build the wheel, install it into a fresh environment outside the checkout, and use it there.
# The heavy dependencies come from the environment in $BIN through a .pth file; the package itself does not.
set -eu
checkout=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "$checkout/$BIN")" && pwd)/$(basename "$BIN")/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$checkout"
"$python" -m build --wheel --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
"$python" -m venv --without-pip "$work/venv"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m pip --python "$work/venv/bin/python" install --quiet --no-deps --no-index "$work"/dist/tokenmill-*.whl
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/dependencies.pth"

cd "$work"
"$work/venv/bin/python" - "$site" <<'PYTHON'
import sys
from pathlib import Path

import tokenmill

home = Path(tokenmill.__file__).resolve().parent
assert home.is_relative_to(Path(sys.argv[1]).resolve()), home
assert (home / "py.typed").is_file()
assert "torch" not in sys.modules
size = sum(file.stat().st_size for file in (home / "assets").rglob("*") if file.is_file())
assert size < 60e6, size
PYTHON
"$work/venv/bin/tokenmill" list
"$work/venv/bin/tokenmill" show token-recycling >/dev/null
"$work/venv/bin/tokenmill" run token-recycling --model python-target --dtype float32 --max-new-tokens 16 \
  --prompt 'def read(path):'
ls -l "$work"/dist/*.whl
