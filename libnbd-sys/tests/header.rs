//! Compares every declaration with the installed `libnbd.h`: generates a C program of static assertions from the tables
//! of the crate, and compiles it.

use std::collections::HashSet;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::mem::{offset_of, size_of};
use std::process::Command;

use libnbd_sys::{CALLBACKS, CONSTANTS, FUNCTIONS, LIBNBD_CONTEXT_BASE_ALLOCATION, nbd_completion_callback};

/// Rust types of the declarations, each with the C type that it stands for. The empty type is that of no result.
const TYPES: &[(&str, &str)] = &[
    ("", "void"),
    ("bool", "bool"),
    ("c_int", "int"),
    ("c_uint", "unsigned"),
    ("i64", "int64_t"),
    ("u32", "uint32_t"),
    ("u64", "uint64_t"),
    ("usize", "size_t"),
    ("*const c_char", "const char *"),
    ("*mut c_char", "char *"),
    ("*const c_void", "const void *"),
    ("*mut c_void", "void *"),
    ("*mut c_int", "int *"),
    ("*mut u32", "uint32_t *"),
    ("*mut nbd_handle", "struct nbd_handle *"),
];

fn c_type(rust: &str) -> &str {
    // The compiler prints the types of a table that has passed through several macros with blanks.
    let compact = rust.replace("* ", "*");
    let known = TYPES.iter().find(|(name, _)| *name == compact).map(|(_, c)| *c);
    known.unwrap_or_else(|| {
        assert!(
            CALLBACKS.iter().any(|(name, _)| *name == rust),
            "no C type is known for {rust}"
        );
        rust
    })
}

fn c_types(rust: &[&str]) -> String {
    if rust.is_empty() {
        "void".to_owned()
    } else {
        rust.iter().map(|t| c_type(t)).collect::<Vec<_>>().join(", ")
    }
}

/// Returns a C program with one static assertion for each declaration.
fn source() -> String {
    let mut out = String::from("#include <libnbd.h>\n#include <stddef.h>\n#include <string.h>\n");
    out.push_str(
        "#define SAME(what, ...) _Static_assert(__builtin_types_compatible_p(__typeof__(what), __VA_ARGS__), #what)\n",
    );
    for (name, arguments, result) in FUNCTIONS {
        let _ = writeln!(out, "SAME(&{name}, {} (*)({}));", c_type(result), c_types(arguments));
    }
    for (name, value) in CONSTANTS {
        let _ = writeln!(out, "_Static_assert((unsigned)({name}) == {value}u, \"{name}\");");
    }
    for (name, arguments) in CALLBACKS {
        let _ = writeln!(
            out,
            "SAME((({name} *)0)->callback, int (*)(void *, {}));",
            c_types(arguments)
        );
        let _ = writeln!(out, "SAME((({name} *)0)->free, void (*)(void *));");
        let layout = [
            ("callback", offset_of!(nbd_completion_callback, callback)),
            ("user_data", offset_of!(nbd_completion_callback, user_data)),
            ("free", offset_of!(nbd_completion_callback, free)),
        ];
        for (field, offset) in layout {
            let _ = writeln!(
                out,
                "_Static_assert(offsetof({name}, {field}) == {offset}, \"{name}.{field}\");"
            );
        }
        let size = size_of::<nbd_completion_callback>();
        let _ = writeln!(out, "_Static_assert(sizeof({name}) == {size}, \"{name}\");");
    }
    let context = LIBNBD_CONTEXT_BASE_ALLOCATION.to_str().unwrap();
    let _ = writeln!(
        out,
        "_Static_assert(__builtin_strcmp(LIBNBD_CONTEXT_BASE_ALLOCATION, \"{context}\") == 0, \"\");"
    );
    out
}

/// Compiles `source`. Returns true if the C compiler accepts it, and the messages of the compiler.
fn compiles(name: &str, source: &str) -> (bool, String) {
    let file = env::temp_dir().join(format!("libnbd-sys-{}-{name}.c", std::process::id()));
    fs::write(&file, source).unwrap();
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let output = Command::new(compiler)
        .args(["-fsyntax-only", "-Wall", "-Werror", "-Wno-nonnull"])
        .arg(&file)
        .output();
    fs::remove_file(&file).unwrap();
    let output = output.expect("a C compiler is needed (CC, or cc)");
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn all_declarations_match_the_installed_header() {
    let (accepted, messages) = compiles("good", &source());
    assert!(accepted, "{messages}");
}

#[test]
fn a_wrong_declaration_is_detected() {
    let good = source();
    for (right, wrong) in [
        (
            "SAME(&nbd_get_size, int64_t (*)(struct nbd_handle *))",
            "SAME(&nbd_get_size, int (*)(struct nbd_handle *))",
        ),
        (
            "(unsigned)(LIBNBD_TLS_REQUIRE) == 2u",
            "(unsigned)(LIBNBD_TLS_REQUIRE) == 1u",
        ),
        (
            "nbd_list_callback *)0)->callback, int (*)(void *, const char *",
            "nbd_list_callback *)0)->callback, int (*)(void *, char *",
        ),
    ] {
        let bad = good.replace(right, wrong);
        assert_ne!(bad, good, "{right} is not in the program");
        assert!(!compiles("bad", &bad).0, "{wrong} was accepted");
    }
}

#[test]
fn nothing_is_declared_twice() {
    let names: HashSet<&str> = FUNCTIONS.iter().map(|(name, ..)| *name).collect();
    assert_eq!(names.len(), FUNCTIONS.len());
}
