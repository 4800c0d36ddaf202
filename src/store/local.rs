//! stub
/// stub
#[derive(Debug)]
pub struct LocalStore;
