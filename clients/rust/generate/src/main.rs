//! Writes the Rust of a descriptor set: `hotgraph-generate DESCRIPTORS OUT` makes OUT/hotgraph.v1.rs. Run by generate.sh,
//! which makes the descriptors.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let [descriptors, out]: [PathBuf; 2] = env::args_os()
        .skip(1)
        .map(PathBuf::from)
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|_| "usage: hotgraph-generate DESCRIPTORS OUT")?;
    let files = prost_types::FileDescriptorSet::decode(fs::read(descriptors)?.as_slice())?;
    let mut settings = tonic_prost_build::Config::new();
    settings.enable_type_names();
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .out_dir(out)
        .compile_fds_with_config(files, settings)?;
    Ok(())
}
