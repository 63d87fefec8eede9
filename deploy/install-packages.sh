#!/usr/bin/env bash
# Install those of the named Debian or Ubuntu packages that are missing, and say which.
# Where that is not possible, say what to install by hand, and fail. A package that the distribution does not have is
# named and passed over; tests that need it are skipped, and say so.
set -euo pipefail

is_installed() { [[ "$(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null)" == installed ]]; }

missing=()
for package in "$@"; do
    is_installed "$package" || missing+=("$package")
done
((${#missing[@]})) || exit 0

by_hand() {
    echo "lowgad: $1; install by hand: ${missing[*]}" >&2
    echo "lowgad: without them, \`.venv/bin/python -m pytest\` runs the tests that need none of them" >&2
    exit 1
}

command -v apt-get >/dev/null || by_hand "this machine has no apt-get"
as_root=()
if ((EUID != 0)); then
    command -v sudo >/dev/null || by_hand "neither root nor sudo"
    as_root=(sudo)
fi

"${as_root[@]}" apt-get update --quiet --quiet || by_hand "apt-get update failed"
available=()
for package in "${missing[@]}"; do
    if [[ -n "$(apt-cache show "$package" 2>/dev/null)" ]]; then
        available+=("$package")
    else
        echo "lowgad: not in this distribution, passed over: $package" >&2
    fi
done
((${#available[@]})) || exit 0

echo "lowgad: installing from the distribution: ${available[*]}"
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install --yes --quiet --quiet --no-install-recommends -o Dpkg::Use-Pty=0 "${available[@]}" >/dev/null ||
    by_hand "apt-get install failed"
