//! Removal of secrets from the command line that `ps` and `/proc` show.
//!
//! The kernel shows the memory that the arguments lie in, which a process may overwrite. It does so right after it has
//! copied them. What another process read before that moment cannot be helped, so a password on the command line is
//! accepted with a warning.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Keys whose values are secret.
const SECRET_KEYS: [&[u8]; 3] = [b"password=", b"cookie=", b"header="];

/// Overwrites the secrets among the arguments of this process. Does nothing where the system does not permit it.
pub fn hide_secrets() {
    let Ok(text) = fs::read("/proc/self/cmdline") else {
        return;
    };
    let secrets = secrets(&text);
    let (Some(start), Some(memory)) = (start_of_arguments(), memory(&secrets)) else {
        return;
    };
    for secret in secrets {
        // As many bytes as before: the kernel shows a fixed range of memory, and the other arguments must stay where
        // they are.
        let stars = vec![b'*'; secret.len()];
        let _ = memory.write_all_at(&stars, start + secret.start as u64);
    }
}

/// Opens the memory of this process for writing, if there is something to write.
fn memory(secrets: &[Range<usize>]) -> Option<File> {
    if secrets.is_empty() {
        return None;
    }
    File::options().write(true).open("/proc/self/mem").ok()
}

/// Returns the address of the first argument: field 48 of `/proc/self/stat` (proc(5)).
fn start_of_arguments() -> Option<u64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name, in parentheses, is field 2, and may hold blanks.
    let fields = stat.rsplit_once(')')?.1;
    fields.split_whitespace().nth(48 - 3)?.parse().ok()
}

/// Returns the ranges of secrets in arguments that are separated by NUL bytes.
fn secrets(arguments: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut start = 0;
    for argument in arguments.split(|b| *b == 0) {
        // An argument of -o is a list of options.
        let mut at = start;
        for word in argument.split(|b| *b == b',') {
            if let Some(key) = SECRET_KEYS.iter().find(|key| contains(word, key) == Some(0)) {
                // `-`, `+FILE` and `-FD` only say where the password is.
                let value = &word[key.len()..];
                if !matches!(value.first(), Some(b'-' | b'+')) {
                    // The rest of the argument: a comma may be part of the secret.
                    found.push(at + key.len()..start + argument.len());
                    break;
                }
            } else if let Some(range) = password_of_url(word) {
                found.push(at + range.start..at + range.end);
            }
            at += word.len() + 1;
        }
        start += argument.len() + 1;
    }
    found
}

/// Returns the range of the password in `scheme://user:password@host/…`.
fn password_of_url(word: &[u8]) -> Option<Range<usize>> {
    let authority = contains(word, b"://")? + 3;
    let rest = &word[authority..];
    let end = rest
        .iter()
        .position(|b| matches!(b, b'/' | b'?' | b'#'))
        .unwrap_or(rest.len());
    let at = rest[..end].iter().rposition(|b| *b == b'@')?;
    let colon = rest[..at].iter().position(|b| *b == b':')?;
    Some(authority + colon + 1..authority + at)
}

fn contains(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hidden(arguments: &str) -> String {
        let mut bytes = arguments.replace('|', "\0").into_bytes();
        for range in secrets(&bytes.clone()) {
            bytes[range].fill(b'*');
        }
        String::from_utf8(bytes).unwrap().replace('\0', "|")
    }

    #[test]
    fn only_the_secrets_are_overwritten() {
        for (given, shown) in [
            ("vmdkfuse|mnt|password=abc|user=u", "vmdkfuse|mnt|password=***|user=u"),
            ("v|-o|ro,cookie=a=b,c|x", "v|-o|ro,cookie=*****|x"),
            (
                "v|password=+/file|password=-|password=-3",
                "v|password=+/file|password=-|password=-3",
            ),
            ("v|url=https://u:pw@h/a:b@c|x", "v|url=https://u:**@h/a:b@c|x"),
            ("v|https://u:p@w@h:1/x", "v|https://u:***@h:1/x"),
            ("v|https://h/a:b@c|nbd://h:1", "v|https://h/a:b@c|nbd://h:1"),
            ("v|file=my-password=x", "v|file=my-password=x"),
        ] {
            assert_eq!(hidden(given), shown);
        }
    }
}
