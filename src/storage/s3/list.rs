//! Listing: every page or an error (a listing that is cut short would hide what is there, I15).

use std::collections::HashSet;

use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::types::EncodingType;

use super::Bucket;
use super::errors::Refusal;
use crate::storage::{ObjectInfo, StorageError};

impl Bucket {
    pub(super) async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StorageError> {
        let mut found = Vec::new();
        let (full_prefix, start) = (self.full_key(prefix), start_after.map(|key| self.full_key(key)));
        self.pages(&full_prefix, start.as_deref(), None, |page| {
            for object in page.contents() {
                let key =
                    object.key().and_then(|key| decode(key, page)).ok_or("it has an object without a readable key")?;
                if !key.starts_with(&full_prefix) {
                    return Err("it has a key outside what was asked for");
                }
                let size =
                    object.size().and_then(|size| u64::try_from(size).ok()).ok_or("it has an object without a size")?;
                // Some stores do not know `start-after`.
                if start.as_deref().is_none_or(|start| key.as_str() > start) {
                    let key = key[self.prefix.len()..].to_owned();
                    found.push(ObjectInfo { key, size, crc32: None, version: object.e_tag().map(str::to_owned) });
                }
            }
            Ok(())
        })
        .await?;
        found.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }

    pub(super) async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        let mut names = Vec::new();
        let full_prefix = self.full_key(prefix);
        self.pages(&full_prefix, None, Some("/"), |page| {
            for folder in page.common_prefixes() {
                let folder = folder
                    .prefix()
                    .and_then(|folder| decode(folder, page))
                    .ok_or("it has a folder without a readable name")?;
                let name = folder.strip_prefix(&full_prefix).ok_or("it has a folder outside what was asked for")?;
                names.push(name.trim_end_matches('/').to_owned());
            }
            Ok(())
        })
        .await?;
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    /// Calls `take` for each page; what it refuses is an error.
    async fn pages(
        &self,
        full_prefix: &str,
        start_after: Option<&str>,
        delimiter: Option<&str>,
        mut take: impl FnMut(&ListObjectsV2Output) -> Result<(), &'static str>,
    ) -> Result<(), StorageError> {
        let mut token: Option<String> = None;
        // A token that comes again would go round for ever.
        let mut seen = HashSet::new();
        // Some stores say that they encode and do not, so this is asked for only when a page cannot be read without: a foreign key may have
        // characters that XML cannot carry, and one such object must not hide all the others.
        let mut encoding = None;
        loop {
            let sent = self
                .client()
                .list_objects_v2()
                .bucket(&self.settings.bucket)
                .prefix(full_prefix)
                .set_start_after(start_after.map(str::to_owned))
                .set_delimiter(delimiter.map(str::to_owned))
                .set_continuation_token(token.clone())
                .set_encoding_type(encoding.clone())
                .send()
                .await;
            let page = match sent.map_err(Refusal::from) {
                Ok(page) => page,
                Err(refusal) if refusal.is_unreadable() && encoding.is_none() => {
                    encoding = Some(EncodingType::Url);
                    continue;
                }
                Err(refusal) => return Err(self.error(refusal, "listing", full_prefix).await),
            };
            let wrong =
                |why: &str| self.unavailable("listing", full_prefix, &format!("the answer is not a listing: {why}"));
            take(&page).map_err(wrong)?;
            match (page.is_truncated(), page.next_continuation_token()) {
                (Some(false), _) => return Ok(()),
                (Some(true), Some(next)) if seen.insert(next.to_owned()) => token = Some(next.to_owned()),
                (Some(true), _) => return Err(wrong("it goes on, but not how")),
                (None, _) => return Err(wrong("it does not say whether it is complete")),
            }
        }
    }
}

/// Undoes the encoding of names, where the page says that it has one. `None` for what is not UTF-8.
fn decode(name: &str, page: &ListObjectsV2Output) -> Option<String> {
    if page.encoding_type() != Some(&EncodingType::Url) {
        return Some(name.to_owned());
    }
    decode_url(name)
}

fn decode_url(name: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
                let (high, low) = (digit(rest.next())?, digit(rest.next())?);
                u8::try_from(high * 16 + low).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoded_names_are_decoded() {
        assert_eq!(decode_url("main/a%20b+c%2B%C3%BC").as_deref(), Some("main/a b c+ü"));
        for bad in ["%", "%4", "%zz", "%ff"] {
            assert_eq!(decode_url(bad), None, "{bad}");
        }
    }
}
