#!/bin/sh
# Make sure that there is a Chromium for the tests of pages: the system's, else Debian's or Ubuntu's package where this
# user may install it. Without one these tests are skipped, so nothing here is an error.
set -u

say() { printf '==> %s\n' "$*"; }
found() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

found >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing Chromium for the tests of pages (Debian's package)"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1
    found >/dev/null && exit 0
fi
say "there is no Chromium, so the tests of pages will be skipped; to run them: apt install chromium"
