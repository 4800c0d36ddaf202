#!/usr/bin/env bash
# Makes target/package/vmdkfuse_VERSION_ARCH.deb of files that are built already, and checks it with lintian if that is
# installed. Called by `make deb`; needs dpkg-dev.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$1 version=$2
arch=$(dpkg --print-architecture)
multiarch=$(dpkg-architecture -qDEB_HOST_MULTIARCH)
work=$(mktemp -d "$out/deb.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/vmdkfuse
mkdir "$root" "$work/debian"
chmod 0755 "$root"
umask 022

make -s install DESTDIR="$root" PREFIX=/usr LIBDIR="/usr/lib/$multiarch" UNITDIR=/lib/systemd/system \
  ZSHDIR=/usr/share/zsh/vendor-completions
install -d -m 0755 "$root/etc/vmdkfuse" "$root/DEBIAN" "$root/usr/share/lintian/overrides"
doc=$root/usr/share/doc/vmdkfuse
{
  echo 'Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/'
  echo 'Upstream-Name: vmdkfuse'
  echo
  printf 'Files: *\nCopyright: %s\nLicense: Expat\n' "$(sed -n 's/^Copyright (c) //p' LICENSE)"
  sed -n '/^Permission is hereby/,$p' LICENSE | sed 's/^$/./; s/^/ /'
} >"$doc/copyright"
rm -f "$doc/LICENSE"
# A local build has no address of its own, which the overrides say.
maintainer="${DEBFULLNAME:-vmdkfuse} <${DEBEMAIL:-vmdkfuse@localhost.localdomain}>"
date=$(date -R -d "@${SOURCE_DATE_EPOCH:-$(stat -c %Y CHANGELOG.md)}")
printf 'vmdkfuse (%s) unstable; urgency=medium\n\n  * See CHANGELOG.md.gz.\n\n -- %s  %s\n' \
  "$version" "$maintainer" "$date" | gzip -9n >"$doc/changelog.gz"
gzip -9n "$doc/CHANGELOG.md"
find "$root/usr/share/man" -type f -name '*.[1-8]' -exec gzip -9n {} +
# A link to a compressed page is compressed, too.
find "$root/usr/share/man" -type l | while read -r link; do
  ln -s "$(readlink "$link").gz" "$link.gz"
  rm "$link"
done
cp contrib/package/lintian-overrides "$root/usr/share/lintian/overrides/vmdkfuse"

# dpkg-shlibdeps wants a source package to stand in.
printf 'Source: vmdkfuse\n\nPackage: vmdkfuse\nArchitecture: any\n' >"$work/debian/control"
depends=$(cd "$work" && dpkg-shlibdeps -O "$root/usr/bin/vmdkfuse" "$root/usr/lib/$multiarch/libvmware-bdwrapper.so.0" |
  sed -n 's/^shlibs:Depends=//p')
cat >"$root/DEBIAN/control" <<CONTROL
Package: vmdkfuse
Version: $version
Architecture: $arch
Maintainer: $maintainer
Installed-Size: $(du -sk --apparent-size "$root" | cut -f1)
Depends: $depends, fuse3
Recommends: libnbd0
Suggests: autofs, nbdkit, qemu-utils
Section: admin
Priority: optional
Description: FUSE file system that shows virtual disks as raw files
 vmdkfuse mounts VMDK disks of any kind with their snapshots, disks on
 datastores of ESXi and vCenter and on other web servers, and exports of NBD
 servers, each as one raw file, for qemu-img, guestfish, mount -o loop, cp and
 every other tool that reads or writes raw disks. It needs no software of
 VMware.
 .
 The package holds the helpers of mount(8) and umount(8) for fstab, a systemd
 unit, and libvmware-bdwrapper, which makes a block device or raw file a
 physical disk of a VMware hypervisor.
CONTROL
install -m 0755 contrib/package/postinst contrib/package/postrm "$root/DEBIAN/"
echo 'libvmware-bdwrapper 0 vmdkfuse' >"$root/DEBIAN/shlibs"
echo 'activate-noawait ldconfig' >"$root/DEBIAN/triggers"
(cd "$root" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | sort -z | xargs -0 md5sum >DEBIAN/md5sums)
package=$out/vmdkfuse_${version}_$arch.deb
dpkg-deb --root-owner-group -Zxz --build "$root" "$package" >/dev/null
if command -v lintian >/dev/null; then
  lintian --allow-root --fail-on error --tag-display-limit 0 "$package"
fi
echo "$package"
