#!/bin/sh
# Make sure that there is a Chromium for the tests of pages: the system's, else Debian's or Ubuntu's package where this
# user may install it. Without one these tests are skipped, so nothing here is an error.
set -u

say() { printf '==> %s\n' "$*"; }
found() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

found >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing Chromium for the tests of pages (Debian's package)"
    wait="-o DPkg::Lock::Timeout=120" # another program may be installing something
    said=$({ apt-get $wait update -qq && DEBIAN_FRONTEND=noninteractive apt-get $wait install -y -qq --no-install-recommends chromium; } 2>&1)
    found >/dev/null && exit 0
    printf '%s\n' "$said" | tail -n 3
fi
say "there is no Chromium, so the tests of pages will be skipped; to run them: apt install chromium"
