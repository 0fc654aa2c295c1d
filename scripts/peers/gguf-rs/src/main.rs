//! What gguf-rs makes of GGUF files. `read FILE...` prints JSON lines: for each file one for its header and metadata,
//! then one per tensor.
#![forbid(unsafe_code)]

use gguf_rs::{GGMLType, get_gguf_container_array_size};
use serde_json::json;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let done = match args.split_first() {
        Some((mode, files)) if mode == Path::new("read") => files.iter().try_for_each(|file| read(file)),
        _ => Err("usage: kestrel-peer-gguf-rs read FILE...".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

/// Prints everything that gguf-rs gives for a file. Dimensions are in ggml's order, fastest first; `offset` counts from
/// `data_offset`.
fn read(path: &Path) -> Result<(), Box<dyn Error>> {
    let model = get_gguf_container_array_size(path.to_str().ok_or("a path that is not UTF-8")?, u64::MAX)?
        .decode()?;
    println!(
        "{}",
        json!({
            "file": path.to_str(), "version": model.get_version(), "alignment": model.alignment(),
            "data_offset": model.data_offset(), "n_kv": model.num_kv(), "n_tensors": model.num_tensor(),
            "metadata": model.metadata(),
        })
    );
    for t in model.tensors() {
        let ty = GGMLType::try_from(t.kind)?.to_string();
        println!(
            "{}",
            json!({
                "name": t.name, "kind": t.kind, "type": ty, "shape": t.shape, "offset": t.offset, "size": t.size,
            })
        );
    }
    Ok(())
}
