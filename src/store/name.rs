//! stub
/// stub
#[derive(Debug, Clone)]
pub struct ExtentName(String);
