//! Parts of the manifest that could be small in the file and large in memory.

use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// Longest container configuration that is read, bytes. Engines write a few ten thousand; read, a list of numbers takes
/// forty times its length.
const LONGEST_SPEC: usize = 4 << 20;

/// A list of at most `N` items: one more, and no further one is read.
pub fn at_most<'de, D, T, const N: usize>(from: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct List<T, const N: usize>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for List<T, N> {
        type Value = Vec<T>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "a list of at most {N} items")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(item) = items.next_element()? {
                if list.len() == N {
                    return Err(A::Error::invalid_length(N + 1, &self));
                }
                list.push(item);
            }
            Ok(list)
        }
    }
    from.deserialize_seq(List::<T, N>(PhantomData))
}

/// A container's configuration. Its length is looked at before it is taken apart.
pub fn spec<'de, D: Deserializer<'de>>(from: D) -> Result<Value, D::Error> {
    let text: &RawValue = Deserialize::deserialize(from)?;
    let text = text.get();
    if text.len() > LONGEST_SPEC {
        return Err(D::Error::custom(format!("a configuration of {} bytes", text.len())));
    }
    serde_json::from_str(text).map_err(D::Error::custom)
}
