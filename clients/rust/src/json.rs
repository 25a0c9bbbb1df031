//! Canonical JSON of the messages, as all languages read and write it (feature `json`).

use std::sync::LazyLock;

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(include_bytes!("v1/descriptors.binpb").as_slice()).expect("protoc made these descriptors")
});

/// Why a message could not be read or written.
#[derive(Debug)]
pub struct JsonError(Box<dyn std::error::Error + Send + Sync>);

impl std::fmt::Display for JsonError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for JsonError {}

/// The message as JSON. Fails for a message that is none of `hotgraph.v1` and for times that JSON cannot tell.
pub fn to_string<M: Message + Name>(message: &M) -> Result<String, JsonError> {
    let mut dynamic = DynamicMessage::new(descriptor::<M>()?);
    dynamic.merge(message.encode_to_vec().as_slice()).map_err(boxed)?;
    let mut text = Vec::new();
    let mut writer = serde_json::Serializer::new(&mut text);
    dynamic.serialize_with_options(&mut writer, &SerializeOptions::new()).map_err(boxed)?;
    String::from_utf8(text).map_err(boxed)
}

/// The message that the JSON stands for. Fails for a field that it does not have.
pub fn from_str<M: Message + Name + Default>(text: &str) -> Result<M, JsonError> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let dynamic = DynamicMessage::deserialize(descriptor::<M>()?, &mut reader).map_err(boxed)?;
    reader.end().map_err(boxed)?;
    M::decode(dynamic.encode_to_vec().as_slice()).map_err(boxed)
}

fn descriptor<M: Name>() -> Result<MessageDescriptor, JsonError> {
    let name = M::full_name();
    POOL.get_message_by_name(&name).ok_or_else(|| JsonError(format!("{name} is not known").into()))
}

fn boxed(error: impl std::error::Error + Send + Sync + 'static) -> JsonError {
    JsonError(Box::new(error))
}
