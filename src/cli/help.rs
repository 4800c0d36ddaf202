//! Texts of `-h` and `--help`. The sections of the keys are generated from the table.

use std::fmt::Write as _;

use super::key::Group;
use super::keys::ready;
use crate::process::output;

/// Usage lines of the help.
pub(super) const USAGE: &str = "vmdkfuse [OPTIONS] MOUNTPOINT[/FILENAME] KEY=VALUE...
       vmdkfuse [OPTIONS] --config FILE.toml [MOUNTPOINT[/FILENAME]]
       vmdkfuse --list [--json] uri=URI|server=HOST|url=URL
       vmdkfuse --info|--map|--check [--json] KEY=VALUE...
       vmdkfuse --create file=FILE create-size=SIZE [KEY=VALUE...]
       vmdkfuse --commit cow=FILE file=BASE
       vmdkfuse --prefetch cache-dir=DIR KEY=VALUE...
       vmdkfuse --unmount MOUNTPOINT...|--config FILE.toml
       vmdkfuse --fingerprint server=HOST
       vmdkfuse --dump [--json] [libdir=DIR]";

/// Ten uses of the program, for the short help. Each is explained in the manual.
pub(super) const EXAMPLES: &str = "\
Options of a mount: -r, -f, -v, -o OPT,..., --pidfile FILE, --log-file FILE, --threads N.

Examples:
  vmdkfuse mnt/ file=Fedora.vmdk                    mount a disk: mnt/Fedora.raw holds its bytes
  vmdkfuse -r mnt/ file=Fedora-000002.vmdk          a snapshot, with its parents, read-only
  vmdkfuse mnt/ file=Fedora.vmdk cow=tmp            write without touching the image
  vmdkfuse mnt/ 'file=/vm/*.vmdk'                   several disks in one mount
  vmdkfuse mnt/ nbd://host/export                   an export of an NBD server
  vmdkfuse mnt/ https://example.com/disk.vmdk       a disk on a web server
  vmdkfuse mnt/ server=esxi user=root password=- file=\"[datastore1] Fedora/Fedora.vmdk\"
  vmdkfuse --info Fedora.vmdk                       size, format, extents and chain, without a mount
  vmdkfuse --create new.vmdk create-size=20G        a new, empty disk
  vmdkfuse --unmount mnt/                           unmount, and wait until all is written

All options and keys: vmdkfuse --help, man vmdkfuse. Files for --config: man vmdkfuse.toml. fstab: man mount.vmdkfuse.
";

/// Section of the help about MOUNTPOINT, bare values, mount options and values.
const FORMS: &str = "\
MOUNTPOINT is a directory (the disks are files in it), a name that does not exist yet in a directory (the disk is a file of \
that name), or a regular file (the mount covers it: it shows the disk). A value without KEY= means file= (for nbd:// and \
similar uri=, for https:// url=).

Mount options (-o): ro, rw, allow_other, allow_root, default_permissions, auto_unmount, nonempty, uid=N, gid=N, umask=OCTAL, \
fsname=TEXT, the flags of mount(8) such as noexec and nosuid, and KEY=VALUE as below. Options that mount(8) handles itself \
are ignored.";

/// Last section of the help.
const VALUES: &str = "SIZE takes K, M, G, T; BOOL takes true/false, yes/no, on/off, 1/0. Examples: vmdkfuse -h. The manual: \
man vmdkfuse.";

/// Widest line of the help, in columns. Longer ones are hard to read.
const HELP_WIDTH: usize = 100;

/// Column at which the explanation of a key starts.
const INDENT: usize = 32;

/// Columns that an explanation needs beside a key. With fewer it starts on a line of its own.
const NARROW: usize = 30;

/// Column at which an explanation on a line of its own starts.
const NARROW_INDENT: usize = 8;

/// Returns the part of the long help below the options.
pub(super) fn after_long_help() -> String {
    let width = help_width();
    let (forms, values) = (paragraphs(FORMS, width), paragraphs(VALUES, width));
    format!("{forms}\n{}\n{values}", keys(width))
}

/// Returns the width of the help in columns: that of the terminal, or `COLUMNS` where the output goes elsewhere.
pub(super) fn help_width() -> usize {
    let variable = || std::env::var("COLUMNS").ok()?.parse().ok();
    output::columns(std::io::stdout())
        .or_else(variable)
        .unwrap_or(HELP_WIDTH)
        .clamp(20, HELP_WIDTH)
}

/// Returns the help section of the keys that work in this build, by group, wrapped to `width` columns.
fn keys(width: usize) -> String {
    let mut out = String::from("Keys (before the first file= they apply to all disks, after it to its disk):\n");
    for group in Group::ALL {
        let mut keys = ready(group).peekable();
        if keys.peek().is_some() {
            _ = writeln!(out, "  {}:", group.title());
        }
        for key in keys {
            let head = format!("    {}={}", key.name, key.kind.placeholder());
            explain(&mut out, &head, &key.explanation(), width);
        }
    }
    out
}

/// Appends the form of a key with its explanation next to it, or below it where the lines are short.
fn explain(out: &mut String, form: &str, explanation: &str, width: usize) {
    let indent = if width < INDENT + NARROW { NARROW_INDENT } else { INDENT };
    if form.len() > indent {
        _ = writeln!(out, "{form}");
        wrap(out, "", explanation, indent, width);
    } else {
        wrap(out, form, explanation, indent, width);
    }
}

/// Returns paragraphs, which a blank line separates, wrapped to `width` columns.
fn paragraphs(text: &str, width: usize) -> String {
    let mut out = String::new();
    for (number, paragraph) in text.split("\n\n").enumerate() {
        if number > 0 {
            out.push('\n');
        }
        wrap(&mut out, "", paragraph, 0, width);
    }
    out
}

/// Appends `first` and the words of `text`, in lines of at most `width` columns. All words start at column `indent`.
fn wrap(out: &mut String, first: &str, text: &str, indent: usize, width: usize) {
    let mut line = format!("{first:indent$}");
    let blank = if indent > 0 { " " } else { "" };
    let mut separator = blank;
    for word in text.split_whitespace() {
        let is_empty = line.trim_start().is_empty();
        if !is_empty && line.chars().count() + 1 + word.chars().count() > width {
            _ = writeln!(out, "{line}");
            line = " ".repeat(indent);
            separator = blank;
        }
        _ = write!(line, "{separator}{word}");
        separator = " ";
    }
    _ = writeln!(out, "{line}");
}

#[cfg(test)]
mod tests {
    use super::super::keys::KEYS;
    use super::*;

    #[test]
    fn help_holds_every_key_that_works_and_fits_the_width() {
        for width in [40, 96] {
            let help = keys(width);
            for key in KEYS {
                let form = format!("    {}={}", key.name, key.kind.placeholder());
                let lines = help.lines().filter(|line| {
                    line.strip_prefix(&form)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
                });
                assert_eq!(lines.count(), usize::from(key.is_ready()), "{form} in:\n{help}");
            }
            // Only a word that is longer than a line may be beyond its end.
            let is_long = |line: &str| line.chars().count() > width && line.split_whitespace().count() > 1;
            let heads = |line: &str| line.starts_with("    ") && !line.starts_with("     ");
            for line in help.lines().skip(1).filter(|line| !heads(line)) {
                assert!(!is_long(line), "too long: {line}");
            }
        }
    }

    #[test]
    fn paragraphs_are_wrapped_at_blanks_and_kept_apart() {
        assert_eq!(paragraphs("a bc def\n\nghij", 5), "a bc\ndef\n\nghij\n");
    }
}
