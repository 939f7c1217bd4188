#!/bin/sh
# Make sure that there is a Chromium for the page tests: the system's, or Debian's or Ubuntu's package if this user
# may install it. Without one these tests are skipped, so nothing here is an error.
set -u

say() { printf '==> %s\n' "$*"; }
chromium_installed() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

chromium_installed >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing Chromium for the page tests (Debian's package)"
    wait="-o DPkg::Lock::Timeout=120" # another program may be installing something
    output=$({ apt-get $wait update -qq && DEBIAN_FRONTEND=noninteractive apt-get $wait install -y -qq --no-install-recommends chromium; } 2>&1)
    chromium_installed >/dev/null && exit 0
    printf '%s\n' "$output" | tail -n 3
fi
say "Chromium is not installed, so the page tests will be skipped; to run them: apt install chromium"
