//! Dequantizes every tensor of a GGUF file for the peer tests: `dequantize FILE.gguf OUT` writes OUT/NAME.f32, raw
//! little-endian.
#![forbid(unsafe_code)]

use kestrel_formats::gguf::Gguf;
use kestrel_quant::codec::codec;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(file), Some(out)) = (args.next(), args.next()) else {
        return Err("usage: dequantize FILE.gguf OUT".into());
    };
    let file = Gguf::open(&file)?;
    for info in file.tensors() {
        let view = file.tensor(&info.name).ok_or("a listed tensor")?;
        let mut values = vec![0.0f32; info.shape.iter().product::<u64>() as usize];
        codec(info.dtype).dequantize(view.bytes, &mut values);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        std::fs::write(out.join(format!("{}.f32", info.name)), bytes)?;
    }
    Ok(())
}
