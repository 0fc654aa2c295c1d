//! What candle-core makes of GGUF files. `dequantize FILE OUT` writes OUT/NAME.f32 for each tensor, raw little-endian;
//! `read FILE` only reads them, and `safetensors FILE` reads a file with that crate, for a comparison of readers.
#![forbid(unsafe_code)]

use candle_core::Device;
use candle_core::quantized::gguf_file::Content;
use std::error::Error;
use std::fs::File;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["dequantize", file, out] => read(file, Some(Path::new(out))),
        ["read", file] => read(file, None),
        ["safetensors", file] => {
            let bytes = std::fs::read(file)?;
            for (_, view) in safetensors::SafeTensors::deserialize(&bytes)?.iter() {
                let _ = view.data().len();
            }
            Ok(())
        }
        _ => Err("usage: kestrel-peer-candle dequantize FILE OUT | read FILE | safetensors FILE".into()),
    }
}

/// Reads every tensor of a GGUF file and, with a folder, writes its values there.
fn read(path: &str, out: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let mut file = File::open(path)?;
    let content = Content::read(&mut file)?;
    for name in content.tensor_infos.keys() {
        let tensor = content.tensor(&mut file, name, &Device::Cpu)?;
        let Some(out) = out else { continue };
        let values: Vec<f32> = tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        std::fs::write(out.join(format!("{name}.f32")), bytes)?;
    }
    Ok(())
}
