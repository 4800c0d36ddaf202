//! Manual pages and completions in `contrib/`, generated from the table of keys and the options. Not part of the program.
//!
//! Each file has a template beside it (`vmdkfuse.1.in`), in which a line `@NAME@` stands for a generated section. The
//! test below compares the committed files with what the templates and tables give now; `make manual` writes them.

mod completions;
mod roff;

use std::fs;
use std::path::Path;

/// Generates a section from the tables.
type Section = fn() -> String;

/// Generated files, and the sections that their templates name.
const FILES: [(&str, &[(&str, Section)]); 6] = [
    (
        "man/vmdkfuse.1",
        &[("@OPTIONS@", roff::options), ("@KEYS@", roff::keys)],
    ),
    (
        "man/vmdkfuse.toml.5",
        &[("@MOUNT@", roff::mount_table), ("@KEYS@", roff::toml_keys)],
    ),
    ("man/mount.vmdkfuse.8", &[]),
    (
        "completions/vmdkfuse.bash",
        &[
            ("@KEYS@", completions::bash_keys),
            ("@VALUES@", completions::bash_values),
            ("@OPTIONS@", completions::bash_options),
        ],
    ),
    (
        "completions/_vmdkfuse",
        &[
            ("@KEYS@", completions::zsh_keys),
            ("@VALUES@", completions::zsh_values),
            ("@OPTIONS@", completions::zsh_options),
        ],
    ),
    (
        "completions/vmdkfuse.fish",
        &[
            ("@KEYS@", completions::fish_keys),
            ("@OPTIONS@", completions::fish_options),
        ],
    ),
];

/// Fills in the template of a file.
fn generate(template: &str, sections: &[(&str, Section)]) -> String {
    let mut out = String::new();
    for line in template.lines() {
        match sections.iter().find(|(name, _)| *name == line) {
            Some((_, section)) => out.push_str(&section()),
            None => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    out.replace("@VERSION@", env!("CARGO_PKG_VERSION"))
}

/// "A test fails when one is stale." With `VMDKFUSE_WRITE_MANUAL=1` it writes the files instead (`make manual`).
#[test]
fn manual_pages_and_completions_are_those_of_this_build() {
    let write = std::env::var_os("VMDKFUSE_WRITE_MANUAL").is_some();
    for (name, sections) in FILES {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib").join(name);
        let template = fs::read_to_string(format!("{}.in", file.display())).unwrap();
        for (section, _) in sections {
            assert!(
                template.lines().any(|line| line == *section),
                "{name}.in lacks {section}"
            );
        }
        let now = generate(&template, sections);
        if write {
            fs::write(&file, &now).unwrap();
        }
        let committed = fs::read_to_string(&file).unwrap_or_default();
        assert!(
            committed == now,
            "contrib/{name} is stale: run `make manual` and commit what it writes"
        );
    }
}
