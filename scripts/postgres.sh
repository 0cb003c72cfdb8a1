#!/bin/sh
# Gets the PostgreSQL server that the tests run: installs it as root, else unpacks Debian's packages into the folder $1.
# Never fails: without a server its tests are skipped, and say so.
set -u
target=$1
# As few questions, services and extras as the server alone needs.
export DEBIAN_FRONTEND=noninteractive
options='-qq -o APT::Install-Recommends=false -o DPkg::Lock::Timeout=60'

install_it() {
    # Debian would make a cluster of its own and start it.
    extra=/etc/postgresql-common/createcluster.d/no-cluster-for-tests.conf
    mkdir -p "${extra%/*}" && echo 'create_main_cluster = false' >"$extra"
    # shellcheck disable=SC2086
    { apt-get $options update; apt-get $options --yes install postgresql; } >/dev/null 2>"$work/log"
    done=$?
    rm -f "$extra"
    return $done
}

unpack_it() {
    # Lists of our own, since only root may refresh the machine's.
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/root"
    options="$options -o Dir::State::Lists=$work/lists -o Dir::Cache=$work/cache"
    # shellcheck disable=SC2086
    {
        apt-get $options update
        # A third word in brackets is a version in place: an upgrade that we can do without, libc's above all.
        missing=$(apt-get $options --simulate install postgresql | awk '/^Inst/ && $3 !~ /^\[/ { print $2 }')
        (cd "$work" && apt-get $options download $missing)
    } >/dev/null 2>"$work/log"
    for package in "$work"/*.deb; do
        dpkg -x "$package" "$work/root" 2>>"$work/log" || return 1
    done
    rm -rf "$target" && mv "$work/root" "$target"
}

if ! command -v apt-get >/dev/null; then
    echo "No PostgreSQL and no apt-get here: its tests are skipped until its programs are on PATH"
    exit 0
fi
echo 'Getting PostgreSQL for the tests'
mkdir -p "$(dirname "$target")"
target=$(cd "$(dirname "$target")" && pwd)/$(basename "$target")
# Beside the target, so that a broken run leaves nothing in its place.
work=$(mktemp -d "$target.XXXXXX") || exit 0
trap 'rm -rf "$work"' EXIT
if [ "$(id -u)" = 0 ] && install_it; then exit 0; fi
unpack_it || { echo 'PostgreSQL could not be got; its tests are skipped:'; tail -n 3 "$work/log"; }
exit 0
