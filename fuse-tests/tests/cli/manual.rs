//! The manual pages and the completions of `contrib/`, in the programs that read them.

use std::fs;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{Cmd, Scratch, need};

/// Returns the path of a file in `contrib/`.
fn contrib(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib").join(name)
}

/// "`man --warnings` and `mandoc -Tlint` are silent"
#[test]
fn manual_pages_have_no_warnings() {
    if !need("man") || !need("mandoc") {
        return;
    }
    for page in [
        "man/vmdkfuse.1",
        "man/vmdkfuse.toml.5",
        "man/mount.vmdkfuse.8",
        "bdwrapper/vmware-bdwrapper.1",
    ] {
        let page = contrib(page);
        let lint = Cmd::new("mandoc").arg("-Tlint").arg(&page).run().ok();
        assert_eq!(lint.stdout + &lint.stderr, "", "{}", page.display());
        let formatted = Cmd::new("man")
            .args(["--warnings", "-l"])
            .arg(&page)
            .env("MANPAGER", "cat")
            .run()
            .ok();
        assert!(
            formatted.stderr.is_empty() && formatted.stdout.lines().count() > 20,
            "{formatted}"
        );
    }
}

/// Lines as a user types them, with the arguments that the program then gets. A tab completes.
const TYPED: [(&str, &str); 6] = [
    ("vmdkfuse mnt fi\tdis\t", "<mnt><file=disk.vmdk>"),
    (
        "vmdkfuse mnt file=dis\tkern\tof\t",
        "<mnt><file=disk.vmdk><kernel-view=off>",
    ),
    ("vmdkfuse mnt cache=wr\tt\t", "<mnt><cache=writethrough>"),
    (
        "vmdkfuse mnt create-type=stream\t",
        "<mnt><create-type=stream-optimized>",
    ),
    ("vmdkfuse --inf\tform\tr\t", "<--info><format=raw>"),
    ("vmdkfuse --log-fo\tjs\tmn\t", "<--log-format><json><mnt>"),
];

/// Types [`TYPED`] into `shell`, in which `vmdkfuse` writes its arguments to the file `out`, and compares them.
fn complete(shell: &str, rc: (&str, &str), command: &str) {
    if !need(shell) || !need("script") {
        return;
    }
    let scratch = Scratch::new();
    scratch.write(rc.0, rc.1.replace("CONTRIB", contrib("completions").to_str().unwrap()));
    scratch.write("disk.vmdk", "");
    scratch.mkdir("mnt");
    let lines: String = TYPED.iter().map(|(line, _)| format!("{line}\n")).collect();
    scratch.write("typed", lines + "exit\n");
    let home = scratch.root().to_str().unwrap();
    let terminal = Cmd::new("sh")
        .args(["-c", r#"timeout -s KILL 50 script -qec "$0" /dev/null <typed"#, command])
        .dir(home)
        .env("HOME", home)
        .env("ZDOTDIR", home)
        .env("TERM", "xterm")
        .run();
    let out = fs::read_to_string(scratch.path("out")).unwrap_or_default();
    let expected: Vec<&str> = TYPED.iter().map(|(_, arguments)| *arguments).collect();
    // Some shells leave out the slash at the end of a folder's name.
    assert_eq!(
        out.replace("/>", ">").lines().collect::<Vec<_>>(),
        expected,
        "{shell}: {terminal}"
    );
}

/// "`vmdkfuse mnt fi<TAB>`, values of enums, files after `file=`"
#[test]
fn bash_completes_options_keys_words_and_files() {
    let rc = "PS1='$ '\nbind 'set bell-style none'\nvmdkfuse() { printf '<%s>' \"$@\" >>out; echo >>out; }\n\
              source CONTRIB/vmdkfuse.bash\n";
    complete("bash", ("0.bash", rc), "bash --rcfile 0.bash -i");
}

#[test]
fn zsh_completes_options_keys_words_and_files() {
    let rc = "PS1='$ '\nvmdkfuse() { printf '<%s>' \"$@\" >>out; echo >>out; }\nfpath=(CONTRIB $fpath)\n\
              autoload -Uz compinit; compinit -u -D\n";
    complete("zsh", (".zshrc", rc), "zsh -i");
}

#[test]
fn fish_completes_options_keys_words_and_files() {
    let rc = "function vmdkfuse; printf '<%s>' $argv >>out; echo >>out; end\nsource CONTRIB/vmdkfuse.fish\n";
    complete("fish", ("0.fish", rc), "fish --no-config -C 'source 0.fish' -i");
}
