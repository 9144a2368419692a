//! The header of a safetensors file. What it says is checked by the `safetensors` crate; it is read here, since that
//! crate's reader holds every value of the header before it looks at one, thirty times the header's size, and takes the
//! last of two tensors with one name.

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::value::{Error as Complaint, StrDeserializer};
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::excerpt::{complaint, excerpt};

/// Tensors of one file. The largest published models have less than a tenth.
pub(super) const MAX_TENSORS: usize = 1 << 17;
/// Longest name of a tensor.
const MAX_NAME_BYTES: usize = 512;
/// Dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;

/// Reads and checks a header: no two tensors of one name, offsets in order and without gaps, shapes that fit them.
pub(super) fn parse(header: &[u8]) -> Result<Metadata, String> {
    let Header(mut tensors) = serde_json::from_slice(header).map_err(|e| complaint(&e))?;
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(format!("tensor `{}` is there twice", pair[0].0));
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    Metadata::new(None, tensors).map_err(|e| complaint(&e))
}

struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    if name.len() > MAX_NAME_BYTES {
                        let name = excerpt(&name, 60);
                        return Err(A::Error::custom(format!("the name `{name}` is too long")));
                    }
                    if tensors.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format!("it has more than {MAX_TENSORS} tensors")));
                    }
                    let Entry { dtype, shape, data_offsets } = map
                        .next_value()
                        .map_err(|e| A::Error::custom(format!("tensor `{name}`: {}", complaint(&e))))?;
                    tensors.push((name, TensorInfo { dtype: dtype.0, shape: shape.0, data_offsets }));
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}

#[derive(Deserialize)]
struct Entry {
    dtype: Kind,
    shape: Shape,
    data_offsets: (usize, usize),
}

struct Kind(Dtype);

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = Kind;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a dtype")
            }
            fn visit_str<E: Error>(self, name: &str) -> Result<Kind, E> {
                let kind = Dtype::deserialize(StrDeserializer::<Complaint>::new(&excerpt(name, 30)));
                kind.map(Kind).map_err(|_| E::custom(format!("unknown dtype `{}`", excerpt(name, 30))))
            }
        }
        deserializer.deserialize_str(Name)
    }
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dimensions;
        impl<'de> Visitor<'de> for Dimensions {
            type Value = Shape;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "at most {MAX_DIMENSIONS} whole numbers")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(size) = seq.next_element()? {
                    if shape.len() == MAX_DIMENSIONS {
                        return Err(A::Error::invalid_length(shape.len() + 1, &self));
                    }
                    shape.push(size);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(Dimensions)
    }
}
