//! The program: words → configuration → run → exit status.

fn main() {}
