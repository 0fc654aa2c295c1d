//! The kernels read no byte beyond a row: weights, activations and norms lie directly before an untouchable page, and
//! the results are those of ordinary memory.

use kestrel_formats::{GgmlType, WeightType};
use kestrel_quant::codec::scales::{Absmax, Scales};
use kestrel_runtime::kernels::{ActKind, Acts, Compute, Isa, MatrixRef, Then};
use kestrel_tests::guard::Guarded;

/// Weights and numbers that repeat; what they are does not matter here, but NaN would hide differences.
fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1013) as f32 / 506.5 - 1.0).collect()
}

fn product(isa: Isa, matrix: &MatrixRef, x: &[f32], norm: &[f32], tokens: usize, kind: ActKind) -> Vec<u32> {
    let mut compute = Compute::new(isa, 1, tokens);
    compute.reserve_blocks(matrix.cols);
    let mut acts = Acts::with_capacity(tokens, matrix.cols);
    compute.norm(x, norm, 1e-5, kind, &mut acts);
    let mut out = vec![0.0; tokens * matrix.rows];
    compute.matmul(matrix, &acts, &mut out, Then::Store);
    out.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn products_stay_within_their_rows() {
    for ty in GgmlType::all() {
        let blocks = |n: usize| n.next_multiple_of(ty.block_len());
        for (rows, cols) in
            [(1, blocks(1)), (3, blocks(33)), (17, blocks(300)), (33, blocks(520)), (5, blocks(1024))]
        {
            let mut bytes = vec![0; ty.bytes_for((rows * cols) as u64).expect("whole blocks") as usize];
            kestrel_quant::codec(ty).quantize(&numbers(rows * cols), None, &mut bytes);
            let guarded = Guarded::new(&bytes);
            let plain = MatrixRef::new(ty, rows, cols, &bytes).expect("a matrix");
            let at_the_edge = MatrixRef::new(ty, rows, cols, &guarded).expect("a matrix");
            for tokens in [1, 3, 4, 9, 35] {
                let (x, norm) = (numbers(tokens * cols), numbers(cols));
                let (guarded_x, guarded_norm) = (Guarded::new(&x), Guarded::new(&norm));
                for precise in [false, true] {
                    let kind = ActKind::for_weights(ty, precise);
                    for isa in Isa::all_supported() {
                        let want = product(isa, &plain, &x, &norm, tokens, kind);
                        let got = product(isa, &at_the_edge, &guarded_x, &guarded_norm, tokens, kind);
                        assert_eq!(got, want, "{} {ty} {rows}x{cols}, {tokens} tokens", isa.name());
                    }
                }
            }
            let mut out = vec![0.0; cols];
            kestrel_quant::codec(ty).dequantize(&guarded[..bytes.len() / rows], &mut out);
        }
    }
}

#[test]
fn products_stay_within_codes_and_the_scales_beside_them() {
    let four_bit = [WeightType::Nf4, WeightType::Fp4].into_iter();
    let four_bit = four_bit.flat_map(|ty| [32, 64, 256].map(|blocksize| (ty, Some(blocksize))));
    for (ty, blocksize) in four_bit.chain([(WeightType::Int8, None)]) {
        for (rows, cols) in [(1, 128), (3, 256), (17, 384), (5, 2048usize)] {
            let blocksize = blocksize.unwrap_or(cols); // of int8 a row's
            let n_bytes = ty.bytes_for((rows * cols) as u64).expect("whole bytes") as usize;
            let codes: Vec<u8> = (0..n_bytes).map(|i| (i * 167 % 251) as u8).collect();
            let absmax: Vec<f32> =
                numbers((rows * cols).div_ceil(blocksize)).iter().map(|x| x.abs() + 0.1).collect();
            let (guarded, guarded_absmax) = (Guarded::new(&codes), Guarded::new(&absmax));
            let scales = |absmax| Scales { blocksize, round_to: GgmlType::F32, absmax: Absmax::F32(absmax) };
            let matrix = |codes, absmax| MatrixRef::with_scales(ty, rows, cols, codes, Some(scales(absmax)));
            let plain = matrix(&codes, &absmax).expect("a matrix");
            let at_the_edge = matrix(&guarded, &guarded_absmax).expect("a matrix");
            for tokens in [1, 2, 3, 9] {
                let (x, norm) = (numbers(tokens * cols), numbers(cols));
                for kind in [ActKind::F32, ActKind::for_weights_of_bnb(ty)] {
                    for isa in Isa::all_supported() {
                        let [want, got] =
                            [&plain, &at_the_edge].map(|m| product(isa, m, &x, &norm, tokens, kind));
                        assert_eq!(got, want, "{} {ty} {rows}x{cols}, {tokens} tokens", isa.name());
                    }
                }
            }
        }
    }
}

/// Reads one byte too many if it is told to, in a process of its own.
#[test]
fn the_guard_ends_a_process_that_reads_too_far() {
    const TOLD: &str = "KESTREL_READ_TOO_FAR";
    let guarded = Guarded::new(&[1u8; 100]);
    if std::env::var_os(TOLD).is_some() {
        // SAFETY: none, that is the point: this process ends here.
        let beyond = unsafe { guarded.as_ptr().add(guarded.len()).read_volatile() };
        panic!("read {beyond}");
    }
    let status = std::process::Command::new(std::env::current_exe().expect("this test"))
        .args(["the_guard_ends", "--nocapture"])
        .env(TOLD, "1")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .expect("this test runs");
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(11), "{status}");
}
