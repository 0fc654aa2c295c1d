//! Reads a file with another library, for a comparison of readers: `kestrel-peer-candle candle|safetensors FILE`.
#![forbid(unsafe_code)]

use candle_core::quantized::gguf_file;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["candle", path] => {
            let mut file = std::fs::File::open(path)?;
            let content = gguf_file::Content::read(&mut file)?;
            for name in content.tensor_infos.keys() {
                content.tensor(&mut file, name, &candle_core::Device::Cpu)?;
            }
        }
        ["safetensors", path] => {
            let bytes = std::fs::read(path)?;
            for (_, view) in safetensors::SafeTensors::deserialize(&bytes)?.iter() {
                let _ = view.data().len();
            }
        }
        _ => return Err("usage: kestrel-peer-candle candle|safetensors FILE".into()),
    }
    Ok(())
}
