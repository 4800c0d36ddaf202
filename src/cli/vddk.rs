//! Keys of disks that VMware's VDDK opens, and the conflicts among them. The keys have the names of nbdkit's plugin.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::login::LoginArgs;
use super::outcome::UsageError;
use super::server_args::ServerArgs;
use super::{expand, values};
use crate::config::{CreateConfig, VddkCompression, VddkConfig, VddkOwner, VddkRemote};
use crate::store::https::split_datastore;

/// End of the message about a key that fits no disk that VDDK opens.
pub(super) const NOT_VDDK: &str = "is for disks that VDDK opens: add libdir=DIR, or backend=vddk";

/// Prefix of a managed object reference.
const MOREF: &str = "moref=";

/// Keys of a disk that VDDK opens, as given.
#[derive(Debug, Clone, Default)]
pub(super) struct VddkArgs {
    /// Keys that are settings of the disk as they are.
    pub(super) disk: VddkConfig,
    /// `vm=`
    pub(super) vm: Option<String>,
    /// `datastore=`
    pub(super) datastore: Option<String>,
    /// `snapshot=`
    pub(super) snapshot: Option<String>,
    /// `thumbprint=`, as it was given
    pub(super) thumbprint: Option<String>,
    /// `nfchostport=`
    pub(super) nfc_host_port: Option<u32>,
    /// `prepare-for-access=`
    pub(super) prepare_for_access: bool,
}

impl VddkArgs {
    /// Returns true if the keys name a server, or a disk on one.
    pub(super) fn is_remote(&self, server: &ServerArgs, login: &LoginArgs) -> bool {
        let texts = [&server.host, &server.port, &self.vm, &self.datastore, &self.thumbprint];
        texts.iter().any(|text| text.is_some()) || login.is_given() || self.nfc_host_port.is_some()
    }

    /// Returns the configuration of the disk `file`, and what to tell the user about it. Fails if a key of a remote
    /// connection is missing, or does not fit a local disk: the library would crash.
    pub(super) fn config(
        &self,
        file: OsString,
        create: Option<CreateConfig>,
        server: &ServerArgs,
        login: &LoginArgs,
        accept_cid_mismatch: bool,
    ) -> Result<(VddkConfig, Vec<&'static str>), UsageError> {
        let mut warnings = Vec::new();
        let remote = if self.is_remote(server, login) {
            Some(self.remote(server, login, &mut warnings)?)
        } else {
            None
        };
        let only_remote = [
            ("snapshot", self.snapshot.is_some()),
            ("compression", self.disk.compression != VddkCompression::None),
            ("prepare-for-access", self.prepare_for_access),
        ];
        if let (None, Some((key, _))) = (&remote, only_remote.iter().find(|(_, given)| *given)) {
            return Err(UsageError::of(
                key,
                " needs a server: add server=, user=, password= and vm=moref=ID",
            ));
        }
        let disk = VddkConfig {
            file,
            remote,
            create,
            accept_cid_mismatch,
            timeout: server.timeout,
            retry: server.retry,
            ..self.disk.clone()
        };
        if disk.remote.is_some() && (disk.single_link || disk.create.is_some()) {
            let key = if disk.single_link { "single-link" } else { "create" };
            let rest = "true is for local disks: VDDK does that for no disk of a server";
            return Err(UsageError::of(key, rest));
        }
        Ok((disk, warnings))
    }

    /// Returns the server and the login. Fails with the names of all keys that are missing.
    fn remote(
        &self,
        server: &ServerArgs,
        login: &LoginArgs,
        warnings: &mut Vec<&'static str>,
    ) -> Result<VddkRemote, UsageError> {
        let login = login.login(warnings);
        let needed = [
            ("server", server.host.is_some()),
            ("user", login.user.is_some()),
            ("password", login.password.is_some()),
            ("vm", self.vm.is_some() || self.datastore.is_some()),
        ];
        let missing: Vec<String> = needed
            .iter()
            .filter(|(_, given)| !given)
            .map(|(key, _)| format!("{key}="))
            .collect();
        let (Some(host), Some(user), Some(password)) = (server.host.clone(), login.user, login.password) else {
            return Err(missing_keys(&missing));
        };
        let owner = self.owner()?.ok_or_else(|| missing_keys(&missing))?;
        Ok(VddkRemote {
            server: host,
            port: server.port_number()?.map(u32::from),
            nfc_host_port: self.nfc_host_port,
            user,
            password,
            cookie: login.cookie,
            thumbprint: self.thumbprint.clone(),
            owner,
            snapshot: self.snapshot.clone(),
            prepare_for_access: self.prepare_for_access,
        })
    }

    /// Returns the owner of the disk, or `None` if no key names one. Fails if keys contradict each other.
    fn owner(&self) -> Result<Option<VddkOwner>, UsageError> {
        match (&self.vm, &self.datastore) {
            (Some(vm), None) => Ok(Some(VddkOwner::Vm(vm.clone()))),
            (None, Some(_)) if self.snapshot.is_some() => Err(UsageError::of(
                "snapshot",
                " is one of a virtual machine, but datastore= is given",
            )),
            (None, Some(datastore)) => Ok(Some(VddkOwner::Datastore(datastore.clone()))),
            (None, None) => Ok(None),
            (Some(_), Some(_)) => Err(UsageError::of(
                "vm",
                " and datastore= both name the owner of the disk: give one of them",
            )),
        }
    }
}

/// Returns true if the name of a disk matches a pattern with the wildcards `*`, `?` and `[`. A datastore in brackets at the
/// start of the pattern is a name, and no set of characters.
pub(super) fn matches(pattern: &OsStr, file: &OsStr) -> bool {
    let split = |text: &OsStr| {
        let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match split_datastore(text.as_bytes()) {
            Some((datastore, path)) => (Some(lossy(datastore)), lossy(path)),
            None => (None, lossy(text.as_bytes())),
        }
    };
    let ((datastore, pattern), (of_file, path)) = (split(pattern), split(file));
    let parsed = glob::Pattern::new(&pattern);
    datastore == of_file && parsed.is_ok_and(|parsed| parsed.matches(&path))
}

/// Returns the default file name of a disk: that of its file, without the datastore.
pub(super) fn default_name(disk: &VddkConfig) -> OsString {
    match split_datastore(disk.file.as_bytes()) {
        Some((_, path)) if disk.remote.is_some() => expand::default_name(Path::new(OsStr::from_bytes(path))),
        _ => expand::default_name(Path::new(&disk.file)),
    }
}

fn missing_keys(missing: &[String]) -> UsageError {
    UsageError::new(format!(
        "a disk of a server needs {} too, for VDDK (password=- asks for it, vm=moref=ID names the virtual machine)",
        missing.join(", ")
    ))
}

/// Parses the value of `datastore=`.
pub(super) fn datastore(value: &OsStr) -> Result<String, String> {
    let id = values::text(value)?.strip_prefix(MOREF).filter(|id| !id.is_empty());
    id.map(str::to_owned)
        .ok_or_else(|| "must have the form moref=ID".into())
}

/// Parses the value of `compression=`, whose word the table has checked.
pub(super) fn compression(value: &OsStr) -> VddkCompression {
    match value.to_str() {
        Some("zlib") => VddkCompression::Zlib,
        Some("fastlz") => VddkCompression::FastLz,
        Some("skipz") => VddkCompression::SkipZ,
        _ => VddkCompression::None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_args::{action, disks};
    use super::*;
    use crate::config::{Secret, SourceConfig};

    fn vddk(args: &[&str]) -> VddkConfig {
        match disks(&[&["src"], args].concat()).remove(0).source {
            SourceConfig::Vddk(disk) => *disk,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn libdir_makes_a_local_file_a_disk_of_vddk() {
        let disk = vddk(&["libdir=/v", "file=/a/x.vmdk"]);
        assert_eq!((disk.file, disk.remote), ("/a/x.vmdk".into(), None));
        assert_eq!(disk.library.libdir, Some("/v".into()));
        let disk = vddk(&[
            "backend=vddk",
            "/a/x.vmdk",
            "single-link=true",
            "unbuffered=on",
            "transports=file",
        ]);
        assert!(disk.single_link && disk.unbuffered && disk.library.libdir.is_none());
        assert_eq!(disk.transports.as_deref(), Some("file"));
    }

    #[test]
    fn every_key_of_a_remote_disk_is_kept_as_given() {
        let thumbprint = "00:11:22:33:44:55:66:77:88:99:aa:bb:cc:dd:ee:ff:00:11:22:33";
        let given = format!("thumbprint={thumbprint}");
        let disk = vddk(&[
            "libdir=/v",
            "config=/c",
            "server=h",
            "port=444",
            "nfchostport=903",
            "user=u",
            "password=p",
            "cookie=c",
            &given,
            "vm=moref=vm-1",
            "snapshot=snapshot-2",
            "compression=fastlz",
            "prepare-for-access=yes",
            "vimapiver=6",
            "[ds] a/x.vmdk",
        ]);
        let expected = VddkRemote {
            server: "h".into(),
            port: Some(444),
            nfc_host_port: Some(903),
            user: "u".into(),
            password: Secret::new("p"),
            cookie: Some(Secret::new("c")),
            thumbprint: Some(thumbprint.into()),
            owner: VddkOwner::Vm("moref=vm-1".into()),
            snapshot: Some("snapshot-2".into()),
            prepare_for_access: true,
        };
        assert_eq!(disk.remote, Some(expected));
        assert_eq!(
            (disk.file, disk.compression),
            ("[ds] a/x.vmdk".into(), VddkCompression::FastLz)
        );
        let disk = vddk(&[
            "libdir=/v",
            "server=h",
            "user=u",
            "password=p",
            "datastore=moref=d-1",
            "[ds] x.vmdk",
        ]);
        assert_eq!(
            disk.remote.map(|remote| remote.owner),
            Some(VddkOwner::Datastore("d-1".into()))
        );
    }

    #[test]
    fn an_export_pattern_names_local_disks_and_limits_those_of_a_server() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a.vmdk", "b.vmdk", "c.img"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let pattern = format!("export={}/*.vmdk", dir.path().display());
        let found = disks(&["src", "libdir=/v", &pattern]);
        assert_eq!(
            found.iter().map(|disk| disk.name.clone()).collect::<Vec<_>>(),
            ["a.raw", "b.raw"]
        );
        assert!(found.iter().all(|disk| matches!(disk.source, SourceConfig::Vddk(_))));
        let remote = [
            "src",
            "libdir=/v",
            "server=h",
            "user=u",
            "password=p",
            "vm=moref=1",
            "export=[ds] vm/*.vmdk",
        ];
        let two = disks(&[&remote[..], &["file=[ds] vm/x.vmdk", "file=[ds] vm/y.vmdk"]].concat());
        assert_eq!(two.len(), 2);
        for (file, message) in [
            (Some("file=[ds] other/x.vmdk"), "does not match export=[ds] vm/*.vmdk"),
            (Some("file=[d] vm/x.vmdk"), "does not match"),
            (None, "VDDK lists no disks of a server"),
        ] {
            let args: Vec<&str> = remote.iter().copied().chain(file).collect();
            let error = action(&args).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn missing_and_unfit_keys_are_named() {
        let remote = ["server=h", "user=u", "password=hunter2", "vm=moref=1"];
        for (keys, message) in [
            (&["server=h"][..], "needs user=, password=, vm= too"),
            (&["vm=moref=1", "user=u"], "needs server=, password= too"),
            (&["nfchostport=1"], "needs server=, user=, password=, vm= too"),
            (&[&remote[..], &["datastore=moref=2"]].concat(), "both name the owner"),
            (
                &[&remote[..], &["create=true", "create-size=1M"]].concat(),
                "create=true is for local disks",
            ),
            (&[&remote[..], &["port=https"]].concat(), "is a number"),
            (&["datastore=x"], "must have the form moref=ID"),
            (&["lock=off"], "lock= does not fit"),
            (&["connections=2"], "connections= does not fit"),
            (&["insecure=on"], "insecure= does not fit"),
        ] {
            let error = action(&[&["src", "libdir=/v", "file=[ds] x.vmdk"], keys].concat()).unwrap_err();
            assert!(
                error.contains(message) && !error.contains("hunter2"),
                "{keys:?}: {error}"
            );
        }
        for (args, message) in [
            (
                &["src", "vm=moref=1", "/a.vmdk"][..],
                "vm= is for disks that VDDK opens",
            ),
            (&["src", "/a.vmdk", "vm=moref=1"], "vm= is for disks that VDDK opens"),
            (
                &["src", "/a.vmdk", "libdir=/v", "snapshot=s"],
                "snapshot= needs a server",
            ),
            (&["src", "nbd://h", "libdir=/v"], "libdir= is for disks that VDDK opens"),
            (&["src", "libdir=/v", "dir=/a"], "dir= does not fit"),
            (
                &["src", "/a.vmdk", "libdir=/v", "backend=native"],
                "libdir= is for disks that VDDK opens",
            ),
        ] {
            let error = action(args).unwrap_err();
            assert!(error.contains(message), "{args:?}: {error}");
        }
    }
}
