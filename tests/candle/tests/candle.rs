//! candle-core reads what we write, and its dequantization is an oracle for ours.
#![forbid(unsafe_code)]

use candle_core::quantized::gguf_file;
use kestrel_formats::gguf::Gguf;
use kestrel_quant::codec::codec;
use kestrel_tests::goldens::tiny_dir;
use kestrel_tests::running::convert;
use kestrel_tests::temp_dir::TempDir;

#[test]
fn candle_reads_our_files_and_dequantizes_alike() {
    let device = candle_core::Device::Cpu;
    for file_type in [
        "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m",
        "q6_k",
    ] {
        let dir = TempDir::new();
        let path = dir.path().join("model.gguf");
        convert(&tiny_dir(), file_type, &path);
        let ours = Gguf::open(&path).expect("our file");
        let mut file = std::fs::File::open(&path).expect("our file");
        let theirs = gguf_file::Content::read(&mut file).expect("candle reads it");
        assert_eq!(theirs.tensor_infos.len(), ours.tensors().len());
        for info in ours.tensors() {
            let tensor = theirs.tensor(&mut file, &info.name, &device).expect("candle has the tensor");
            let got =
                tensor.dequantize(&device).and_then(|t| t.flatten_all()?.to_vec1::<f32>()).expect("values");
            let mut expected = vec![0.0; got.len()];
            codec(info.dtype).dequantize(ours.tensor(&info.name).expect("the tensor").bytes, &mut expected);
            let same = got.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{file_type}: {} ({})", info.name, info.dtype);
        }
    }
}
