//! Helper of mount(8): `mount.vmdkfuse SOURCE MOUNTPOINT [-sfnv] [-o OPTS]`.
//!
//! mount(8) runs it for the fstab types `vmdkfuse` and `fuse.vmdkfuse`. Its flags have the meaning that mount(8)
//! defines for all helpers: `-s` ignores unknown options, `-f` succeeds without mounting, `-n` writes no mtab entry, `-N`
//! names the mount namespace to mount in, which is entered before anything is looked up.
//!
//! Source and mount point arrive decoded. The source that the mount table then shows is the one that mount(8) compares
//! with the first field of fstab: a path in its canonical form, anything else as it is.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use clap::{ArgAction, Parser};

use super::disk_args::DiskArgs;
use super::mount_request::{MountRequest, path_in_table};
use super::options::MountArgs;
use super::outcome::{Parsed, UsageError};
use super::settings::DiskPair;
use super::{argument, config_file, values};
use crate::config::Action;

/// Program names under which mount(8) runs the helper.
const NAMES: [&str; 2] = ["mount.vmdkfuse", "mount.fuse.vmdkfuse"];

/// Returns true if `program` is the name of the helper.
pub(super) fn is_name_of(program: &Path) -> bool {
    has_name_of(program, &NAMES)
}

/// End of the name of a file that describes a mount.
const CONFIG_FILE: &str = "toml";

/// Warning about `user=`.
const USER: &str = "user= belongs to mount(8), which drops it where an ordinary user mounts: write username= for the login \
                    at a server, or credentials=FILE";

/// Arguments of the helper.
#[derive(Debug, Parser)]
#[command(name = NAMES[0], no_binary_name = true, disable_help_flag = true)]
struct Helper {
    source: OsString,
    mountpoint: OsString,
    #[arg(short)]
    sloppy: bool,
    #[arg(short)]
    fake: bool,
    /// Asks for no entry in /etc/mtab. The helper writes none.
    #[arg(short = 'n')]
    _no_mtab: bool,
    #[arg(short, action = ArgAction::Count)]
    verbose: u8,
    #[arg(short)]
    options: Vec<OsString>,
    /// The type in fstab. It selected this helper.
    #[arg(short = 't')]
    _fstype: Option<OsString>,
    #[arg(short = 'N')]
    namespace: Option<OsString>,
}

/// Parses the arguments after the helper's name.
pub(super) fn parse(args: impl Iterator<Item = OsString>) -> Result<Parsed, UsageError> {
    let helper = Helper::try_parse_from(args).map_err(|e| UsageError::of_clap(&e))?;
    if helper.fake {
        return Ok(Parsed::Print(String::new()));
    }
    if let Some(namespace) = &helper.namespace {
        enter(namespace)?;
    }
    let source = &helper.source;
    let word = argument::with_key(source);
    let is_path = word.as_encoded_bytes().starts_with(b"file=") && !is_in_datastore(source);
    if !is_path {
        refuse_password(source)?;
    }
    let mut mount_args = MountArgs::default();
    let is_file = is_path && Path::new(source).extension() == Some(OsStr::new(CONFIG_FILE));
    let file = is_file.then(|| config_file::read(source)).transpose()?;
    let file = file.map(|file| file.apply(&mut mount_args)).transpose()?;
    let mut pairs = mount_args.lists_of_mount(&helper.options, helper.sloppy)?;
    mount_args.verbosity(helper.verbose);
    let has = |pairs: &[DiskPair], name| pairs.iter().any(|pair| pair.key.name == name);
    // To mount(8), and so in fstab, it is the user that may unmount. Where a server is named, it is the login all the same.
    let names_user = has(&pairs, "user") && !mount_args.has_username;
    if names_user && !has(&pairs, "server") {
        pairs.retain(|pair| pair.key.name != "user");
    }
    let disk_args = match file {
        Some(file) => file.with(pairs)?,
        None => DiskArgs::of_words(pairs, &[word])?,
    };
    let mut config = MountRequest {
        mountpoint: &helper.mountpoint,
        disk_args,
        mount_args,
        foreground: false,
        source: Some(match is_path {
            true => path_in_table(source),
            false => source.to_string_lossy().into_owned(),
        }),
    }
    .into_config()?;
    if let (true, Action::Mount(mount)) = (names_user, &mut config.action) {
        mount.disks.iter_mut().take(1).for_each(|disk| disk.warnings.push(USER));
    }
    Ok(Parsed::Run(Box::new(config)))
}

/// Returns true for the name of a file in a datastore: `[datastore] folder/disk.vmdk`.
fn is_in_datastore(source: &OsStr) -> bool {
    source.as_encoded_bytes().starts_with(b"[") && !Path::new(source).exists()
}

/// Fails for an address that holds a password, which every user could read in the mount table.
fn refuse_password(address: &OsStr) -> Result<(), UsageError> {
    let text = address.to_string_lossy();
    let authority = text
        .split_once("://")
        .map_or("", |(_, rest)| rest.split(['/', '?', '#']).next().unwrap_or_default());
    match authority.rsplit_once('@') {
        Some((user, host)) if user.contains(':') => Err(UsageError::new(format!(
            "the address of {host} holds a password, which the mount table would show to every user: use credentials=FILE \
             for a web server, tls-psk=FILE for an NBD server"
        ))),
        _ => Ok(()),
    }
}

/// Returns true if the file name of `program` is one of `names`.
pub(super) fn has_name_of(program: &Path, names: &[&str]) -> bool {
    program
        .file_name()
        .is_some_and(|name| names.iter().any(|helper| name == *helper))
}

/// Enters a mount namespace: the path of one, or the ID of a process in it.
pub(super) fn enter(namespace: &OsStr) -> Result<(), UsageError> {
    let is_process = !namespace.is_empty() && namespace.as_encoded_bytes().iter().all(u8::is_ascii_digit);
    let path = if is_process {
        format!("/proc/{}/ns/mnt", namespace.display()).into()
    } else {
        namespace.to_owned()
    };
    let failed = |e: std::io::Error| UsageError::new(format!("-N {}: {e}", values::display(namespace)));
    let file = File::open(&path).map_err(failed)?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Mount)).map_err(|e| failed(e.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::test_args::{config_of, mount_of};
    use super::*;
    use crate::config::{Config, MountConfig};

    fn run(args: &[&str]) -> Result<Config, String> {
        config_of(parse(args.iter().map(OsString::from)))
    }

    fn mount(args: &[&str]) -> MountConfig {
        mount_of(run(args).unwrap())
    }

    #[test]
    fn program_names() {
        for name in ["mount.vmdkfuse", "/sbin/mount.vmdkfuse", "mount.fuse.vmdkfuse"] {
            assert!(is_name_of(Path::new(name)), "{name}");
        }
        for name in ["vmdkfuse", "mount.fuse", "/mount.vmdkfuse/vmdkfuse", ""] {
            assert!(!is_name_of(Path::new(name)), "{name}");
        }
    }

    #[test]
    fn arguments_of_mount_are_parsed() {
        let dir = tempfile::tempdir().unwrap();
        let mnt = dir.path().to_str().unwrap();
        let config = mount(&[
            "/a/x.vmdk",
            mnt,
            "-n",
            "-v",
            "-o",
            "ro,nofail,x-y=z,uid=7,name=n.raw",
            "-t",
            "fuse.vmdkfuse",
        ]);
        assert_eq!(config.target.path, dir.path());
        assert!(config.options.read_only && !config.foreground);
        assert_eq!((config.options.uid, config.disks.len()), (Some(7), 1));
        assert_eq!(config.disks[0].name, "n.raw");
        assert_eq!(run(&["/x", mnt, "-vv"]).unwrap().log.verbosity, 2);
        assert!(!mount(&["/x", mnt, "-o", "rw"]).options.read_only);
    }

    #[test]
    fn the_source_is_always_a_bare_value() {
        let mnt = "/";
        for source in ["/a=b", "cache=none", "cashe=x"] {
            let mount = mount(&[source, mnt]);
            let local = mount.disks[0].source.local().unwrap();
            assert!(local.path.ends_with(source.trim_start_matches('/')), "{local:?}");
        }
        assert_eq!(mount(&["nbd://h/x", mnt]).disks[0].source.label(), "nbd://h/x");
    }

    #[test]
    fn the_mount_table_shows_the_first_field_as_mount_compares_it() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("x.img"), dir.path().join("link.img"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let canonical = fs::canonicalize(&file).unwrap().display().to_string();
        let server = "-o server=esxi,user=u,password=p,insecure=true";
        for (source, options, shown) in [
            (link.to_str().unwrap(), "-v", &*canonical),
            ("/none/x.img", "-v", "/none/x.img"),
            ("nbd://host:10809/a%20b", "-v", "nbd://host:10809/a%20b"),
            ("https://host/x.vmdk?a=b", "-v", "https://host/x.vmdk?a=b"),
            ("[ds 1] a/x.vmdk", server, "[ds 1] a/x.vmdk"),
        ] {
            let words: Vec<&str> = [source, "/"].into_iter().chain(options.split(' ')).collect();
            assert_eq!(mount(&words).source.as_deref(), Some(shown), "{source}");
        }
    }

    #[test]
    fn user_is_the_login_only_where_a_server_is_named_and_warns() {
        let local = mount(&["/x", "/", "-o", "user=anna"]);
        assert!(
            local.disks[0]
                .warnings
                .iter()
                .any(|warning| warning.contains("username="))
        );
        let server = "server=esxi,password=p,insecure=true";
        for (option, warns) in [("user=anna", true), ("username=anna", false)] {
            let remote = mount(&["[ds] x.vmdk", "/", "-o", &format!("{server},{option}")]);
            let warned = remote.disks[0]
                .warnings
                .iter()
                .any(|warning| warning.contains("credentials=FILE"));
            assert_eq!(warned, warns, "{option}: {:?}", remote.disks[0].warnings);
        }
    }

    #[test]
    fn passwords_in_addresses_and_remounts_are_refused() {
        for source in [
            "https://u:secret@h/x.vmdk",
            "nbd://u:secret@h",
            "https://h:1/x@y:z.vmdk",
        ] {
            let refused = run(&[source, "/"]);
            let has_password = source.contains("secret");
            assert_eq!(
                refused.as_ref().is_err_and(|e| e.contains("holds a password")),
                has_password,
                "{refused:?}"
            );
            assert!(!format!("{refused:?}").contains("secret"));
        }
        assert!(
            run(&["/x", "/", "-o", "remount,ro"])
                .unwrap_err()
                .contains("mount it again")
        );
    }

    #[test]
    fn sloppy_ignores_unknown_options() {
        assert!(run(&["/x", "/", "-o", "what,ever=1"]).is_err());
        assert!(mount(&["-s", "/x", "/", "-o", "what,ever=1,ro"]).options.read_only);
    }

    #[test]
    fn fake_does_nothing_and_succeeds() {
        let printed = parse(["-f", "/none", "/none/none"].iter().map(OsString::from));
        assert_eq!(printed, Ok(Parsed::Print(String::new())));
        assert!(run(&["/none", "/none/none"]).is_err());
    }

    #[test]
    fn other_arguments_are_refused() {
        for args in [
            &[][..],
            &["/x"],
            &["/x", "/", "cache=none"],
            &["/x", "/", "-z"],
            &["/x", "/", "--info"],
        ] {
            let error = run(args).unwrap_err();
            assert!(!error.is_empty() && !error.contains('\n'), "{error}");
        }
    }
}
