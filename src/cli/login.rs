//! Keys of the login at a server, which web servers and VDDK take.
//!
//! Passwords are read here, before the daemon forks: a prompt needs the terminal, and a descriptor of the caller is closed
//! later. The values of secret keys are in no message ([`super::key::Key::apply`]).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;

use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

use super::values::{self, Value};
use crate::config::Secret;

/// Permission bits by which another user than the owner reads a file.
const READABLE_BY_OTHERS: u32 = 0o044;

/// Longest password or cookie in bytes.
const MAX_SECRET: u64 = 64 << 10;

/// Keys of the login at a server, as given.
#[derive(Debug, Clone, Default)]
pub(super) struct LoginArgs {
    /// `user=`
    pub(super) user: Option<String>,
    /// `password=`
    pub(super) password: Option<Password>,
    /// `cookie=`
    pub(super) cookie: Option<Secret>,
    /// `credentials=`
    pub(super) credentials: Option<Login>,
}

/// Login at a server. The file of `credentials=` holds one, too.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Login {
    pub(super) user: Option<String>,
    pub(super) password: Option<Secret>,
    pub(super) cookie: Option<Secret>,
}

/// Password as it was given.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Password {
    secret: Secret,
    /// True if it was on the command line.
    shown: bool,
}

impl LoginArgs {
    /// Returns true if any of the keys is given.
    pub(super) fn is_given(&self) -> bool {
        self.user.is_some() || self.password.is_some() || self.cookie.is_some() || self.credentials.is_some()
    }

    /// Returns the login, and adds warnings about it. Keys win over the file of `credentials=`.
    pub(super) fn login(&self, warnings: &mut Vec<&'static str>) -> Login {
        let file = self.credentials.clone().unwrap_or_default();
        let mut password = file.password;
        if let Some(given) = &self.password {
            if given.shown {
                warnings.push(
                    "password=: a password on the command line shows in process listings at the start; use \
                     password=+FILE, password=-FD or password=-",
                );
            }
            password = Some(given.secret.clone());
        }
        Login {
            user: self.user.clone().or(file.user),
            password,
            cookie: self.cookie.clone().or(file.cookie),
        }
    }
}

/// Reads the password that `password=` stands for.
pub(super) fn password(value: &Value<'_>) -> Result<Password, String> {
    let bytes = value.as_bytes();
    let hidden = |secret: String| Password {
        secret: Secret::new(secret),
        shown: false,
    };
    if bytes == b"-" {
        return prompt().map(hidden);
    }
    if let Some(path) = bytes.strip_prefix(b"+") {
        let path = value.path_of(OsStr::from_bytes(path))?;
        let file = File::open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        return first_line(file).map(hidden);
    }
    if let Some(number) = bytes.strip_prefix(b"-") {
        let number = std::str::from_utf8(number)
            .ok()
            .and_then(|text| text.parse::<u32>().ok());
        let number = number.ok_or("-FD must be the number of a descriptor")?;
        // Opened anew by its name, so the caller's descriptor stays as it is.
        let path = format!("/proc/self/fd/{number}");
        let file = File::open(&path).map_err(|e| format!("descriptor {number}: {e}"))?;
        return first_line(file).map(hidden);
    }
    let secret = Secret::new(values::text(value)?);
    Ok(Password { secret, shown: true })
}

/// Reads the file of `credentials=`: lines `username=`, `password=` and `cookie=`.
pub(super) fn credentials(value: &Value<'_>) -> Result<Login, String> {
    let path = value.path()?;
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    let file = File::open(&path).map_err(failed)?;
    if file.metadata().map_err(failed)?.permissions().mode() & READABLE_BY_OTHERS != 0 {
        return Err("others can read the file: run chmod 600 on it".into());
    }
    let mut text = String::new();
    file.take(MAX_SECRET).read_to_string(&mut text).map_err(failed)?;
    let mut found = Login::default();
    for (number, line) in (1..).zip(text.lines()) {
        match line.split_once('=') {
            Some(("username" | "password" | "cookie", "")) => return Err(format!("line {number}: a value is missing")),
            Some(("username", name)) => found.user = Some(name.to_owned()),
            Some(("password", secret)) => found.password = Some(Secret::new(secret)),
            Some(("cookie", secret)) => found.cookie = Some(Secret::new(secret)),
            _ if line.trim().is_empty() || line.starts_with('#') => {}
            _ => return Err(format!("line {number}: expected username=, password= or cookie=")),
        }
    }
    Ok(found)
}

/// Reads the first line of a file, without its end.
fn first_line(file: impl Read) -> Result<String, String> {
    let mut line = String::new();
    let mut reader = BufReader::new(file.take(MAX_SECRET));
    reader.read_line(&mut line).map_err(|e| e.to_string())?;
    let line = line.trim_end_matches(['\n', '\r']);
    match line.is_empty() {
        true => Err("the password is empty".into()),
        false => Ok(line.to_owned()),
    }
}

/// Asks for the password on the terminal, without showing it.
fn prompt() -> Result<String, String> {
    let tty = fs::OpenOptions::new().read(true).write(true).open("/dev/tty");
    let mut tty = tty.map_err(|e| format!("no terminal to ask on: {e}; use password=+FILE"))?;
    let shown = tcgetattr(&tty).map_err(|e| e.to_string())?;
    let mut hidden = shown.clone();
    hidden.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&tty, SetArg::TCSAFLUSH, &hidden).map_err(|e| e.to_string())?;
    let asked = tty.write_all(b"Password: ").map_err(|e| e.to_string());
    let line = asked.and_then(|()| first_line(&tty));
    // Restored whatever happened: a terminal without echo is of no use.
    let restored = tcsetattr(&tty, SetArg::TCSAFLUSH, &shown).map_err(|e| e.to_string());
    let _ = tty.write_all(b"\n");
    restored.and(line)
}

#[cfg(test)]
mod tests {
    use super::super::test_args::{action, warnings, web};
    use super::*;

    #[test]
    fn a_password_comes_from_a_file_or_a_descriptor_without_a_warning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pw");
        fs::write(&path, "s e c\r\nsecond line\n").unwrap();
        let word = format!("password=+{}", path.display());
        let disk = web(&["https://h/x.vmdk", "user=u", &word]);
        assert_eq!(disk.server.password, Some(Secret::new("s e c")));
        assert_eq!(warnings(&["https://h/x.vmdk", "user=u", &word]), 0);
        let file = File::open(&path).unwrap();
        let word = format!("password=-{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let disk = web(&["https://h/x.vmdk", "user=u", &word]);
        assert_eq!(disk.server.password, Some(Secret::new("s e c")));
        assert_eq!(warnings(&["https://h/x.vmdk", "user=u", "password=x"]), 1);
    }

    #[test]
    fn credentials_come_from_a_file_that_only_its_owner_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("login");
        fs::write(&path, "# mine\nusername=me\npassword=a=b \n\ncookie=c=\"1\"\n").unwrap();
        let word = format!("credentials={}", path.display());
        let mode = |bits| fs::set_permissions(&path, fs::Permissions::from_mode(bits)).unwrap();
        mode(0o640);
        let error = action(&["src", "https://h/x.vmdk", &word]).unwrap_err();
        assert!(error.contains("others can read the file"), "{error}");
        mode(0o600);
        let server = web(&["https://h/x.vmdk", &word]).server;
        assert_eq!(server.user.as_deref(), Some("me"));
        assert_eq!(server.password, Some(Secret::new("a=b ")));
        assert_eq!(server.cookie, Some(Secret::new("c=\"1\"")));
        assert_eq!(
            web(&["https://h/x.vmdk", &word, "username=you"]).server.user.as_deref(),
            Some("you")
        );
        fs::write(&path, "user me\n").unwrap();
        let error = action(&["src", "https://h/x.vmdk", &word]).unwrap_err();
        assert!(error.contains("line 1: expected"), "{error}");
    }
}
