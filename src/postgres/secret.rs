/// A password. It has neither `Debug` nor `Display`, so that it cannot reach a log by accident.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

impl Secret {
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    /// For the authentication exchange alone.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}
