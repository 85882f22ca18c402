#!/bin/sh
# Builds every contender. Needs cargo, and CPython 3.13 (PYTHON=..; another 3.x does, with other figures).
# crossmist asks for Rust 1.88; where that toolchain is missing it is left out.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-$(ls "$HOME"/.pyenv/versions/3.13.*/bin/python3 2>/dev/null | tail -n 1)}
[ -d venv ] || "${python:-python3}" -m venv venv
venv/bin/pip install --quiet loky==3.7.0 mpire==2.10.2 aiomultiprocess==0.9.1 numpy
cargo build --release
(cd multiprocess && cargo build --release)
(cd crossmist && cargo build --release) || echo "crossmist: left out" >&2
