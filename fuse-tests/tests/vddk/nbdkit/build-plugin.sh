#!/bin/sh
# build-plugin.sh OUTPUT: compiles nbdkit's plugin for VDDK, which Debian does not package, from the sources beside this script.
# Needs gcc and the header of nbdkit-plugin-dev. Only the plugin and the few helpers that it uses are there, so nothing has to
# be configured.
set -eu
output=$1
config=$(mktemp -d)
trap 'rm -rf "$config"' EXIT
cat > "$config/config.h" <<'END'
#define HAVE_DLADDR 1
#define HAVE_POSIX_MEMALIGN 1
#define HAVE_SYSCONF 1
#define PACKAGE_VERSION "cross-check"
#define VDDK_LIBDIR "/usr/lib/vmware-vix-disklib"
END
cd "$(dirname "$0")/plugin"
gcc -shared -fPIC -O2 -w -pthread -D_GNU_SOURCE -I"$config" \
    -Icommon/include -Icommon/utils -Icommon/replacements -Iplugins/vddk \
    plugins/vddk/*.c common/utils/cleanup.c common/utils/cleanup-nbdkit.c common/utils/vector.c -o "$output" -ldl
