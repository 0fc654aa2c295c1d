//! From a checkpoint to a checkpoint folder as bitsandbytes would have saved it, in one streaming pass.
//!
//! Each shard of the source becomes one shard of the output. Matrices are cut into pieces of whole blocks; a worker
//! quantizes a piece and writes its codes and scales where they belong. Scales that are quantized themselves need the
//! mean of all scales of a matrix: they are collected, and whoever brings the last piece finishes them.

use crate::input::InputFile;
use crate::progress::{Phase, Progress};
use crate::stream::{Piece, Streaming, check_cancel, damage_hash, stream};
use kestrel_formats::arch;
use kestrel_formats::atomic_file::AtomicFile;
use kestrel_formats::atomic_folder::AtomicFolder;
use kestrel_formats::checkpoint::write::{Layout, TensorDecl, layout};
use kestrel_formats::checkpoint::{Checkpoint, Dtype, INDEX_NAME, SINGLE_NAME, SourceTensor};
use kestrel_formats::disk::DiskFile;
use kestrel_formats::limits::BNB_BLOCKSIZES;
use kestrel_formats::{Error, ErrorKind, GgmlType, Result, WeightType};
use kestrel_quant::codec::scales::{NESTED_BLOCKSIZE, dynamic_map, quantize_scales};
use kestrel_quant::codec::{bnb4, bnb8, dequantize};
use kestrel_quant::recipe::Bnb;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

/// Weights of a piece: whole blocks of every size.
const PIECE_WEIGHTS: u64 = 1 << 18;
/// Bytes of a piece of a tensor that is copied.
const PIECE_BYTES: u64 = 1 << 20;
/// Bytes that a JSON number takes at most.
const NUMBER_BYTES: usize = 24;
/// What else of a folder belongs to the model; copied where it is there.
const COMPANIONS: [&str; 11] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
];

/// How to write a checkpoint of bitsandbytes.
#[derive(Clone, Debug)]
pub struct BnbOptions {
    /// The type, the block size and whether scales are quantized.
    pub bnb: Bnb,
    /// `bnb_4bit_compute_dtype`: what the library computes in after loading. It changes no weight.
    pub compute_dtype: GgmlType,
    /// Worker threads.
    pub threads: usize,
    /// Whether an existing folder is replaced.
    pub force: bool,
}

/// A tensor of the output before it is split into its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BnbTensor {
    /// Name in both checkpoints.
    pub name: String,
    /// Type in the source.
    pub source_dtype: GgmlType,
    /// Shape in both.
    pub shape: Vec<u64>,
    /// Type in the output.
    pub dtype: WeightType,
    /// Bytes in the output, of all its parts.
    pub n_bytes: u64,
}

/// What will be written.
pub struct BnbPlan {
    /// Every tensor, by shard and by place in it.
    pub tensors: Vec<BnbTensor>,
    /// Bytes of the source's files.
    pub source_bytes: u64,
    /// Bytes of the output's shards.
    pub output_bytes: u64,
    /// What the user may want to know although nothing is wrong.
    pub warnings: Vec<String>,
    source_dir: PathBuf,
    files: Vec<InputFile>,
    sources: Vec<SourceTensor>,
    shards: Vec<Shard>,
    /// Per tensor, the indices of its parts in its shard's `decls`.
    parts: Vec<Vec<usize>>,
    /// config.json, the index and the copied files, by name.
    texts: Vec<(String, Vec<u8>)>,
}

/// A shard of the output.
struct Shard {
    name: String,
    decls: Vec<TensorDecl>,
    layout: Layout,
}

/// Plans the output. Reads the small files, and of the shards nothing.
///
/// Errors: `Unsupported` if the source is quantized already or has a matrix whose rows are no whole bytes, `Usage` for a
/// block size that the library does not have, `Io`.
pub fn plan_bnb(source: &Checkpoint, options: &BnbOptions) -> Result<BnbPlan> {
    let bnb = options.bnb;
    if bnb.dtype != WeightType::Int8 && !BNB_BLOCKSIZES.contains(&(bnb.blocksize as u64)) {
        return Err(Error::new(ErrorKind::Usage)
            .what("block size")
            .expected(format!("one of {BNB_BLOCKSIZES:?}"))
            .found(bnb.blocksize));
    }
    let quantized: HashMap<String, bool> = arch::tensors(source.hyperparams(), source.tied())
        .into_iter()
        .map(|(spec, layer)| (spec.hf_name(layer), bnb.quantizes(spec.role)))
        .collect();
    let n_shards = source.shards().len();
    let mut plan = BnbPlan {
        tensors: Vec::new(),
        source_bytes: source.shards().iter().map(|s| s.file_bytes).sum(),
        output_bytes: 0,
        warnings: Vec::new(),
        source_dir: source.dir().to_owned(),
        files: source.shards().iter().map(|s| InputFile::new(&s.path)).collect::<Result<_>>()?,
        sources: source.tensors().to_vec(),
        shards: Vec::with_capacity(n_shards),
        parts: Vec::new(),
        texts: Vec::new(),
    };
    let mut decls = vec![Vec::new(); n_shards];
    let mut ragged = 0;
    for t in &plan.sources {
        let WeightType::Ggml(source_dtype) = t.dtype else {
            return Err(Error::new(ErrorKind::Unsupported)
                .file(source.dir())
                .what(format!("tensor \"{}\"", t.name))
                .expected("an unquantized checkpoint")
                .found(t.dtype)
                .hint("start from the 16-bit model"));
        };
        let shard = &mut decls[t.place.shard];
        let first = shard.len();
        let dtype = match quantized.get(&t.name) {
            Some(true) => {
                shard.extend(parts_of(t, source_dtype, bnb).map_err(|e| e.file(source.dir()))?);
                ragged += usize::from(!t.shape[1].is_multiple_of(bnb.blocksize as u64));
                bnb.dtype
            }
            _ => {
                let dtype = safetensors_dtype(source_dtype);
                shard.push(TensorDecl { name: t.name.clone(), dtype, shape: t.shape.clone() });
                t.dtype
            }
        };
        plan.parts.push((first..shard.len()).collect());
        let (name, shape) = (t.name.clone(), t.shape.clone());
        plan.tensors.push(BnbTensor { name, source_dtype, shape, dtype, n_bytes: 0 });
    }
    if ragged > 0 && bnb.dtype != WeightType::Int8 {
        plan.warnings.push(format!(
            "in {ragged} matrices a block of {} weights lies in two rows; bitsandbytes' AVX-512 kernel takes wrong scales \
             for such",
            bnb.blocksize
        ));
    }
    for (i, decls) in decls.into_iter().enumerate() {
        let name = match n_shards {
            1 => SINGLE_NAME.to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        plan.shards.push(Shard { name, layout: layout(&decls), decls });
    }
    for ((tensor, t), parts) in plan.tensors.iter_mut().zip(&plan.sources).zip(&plan.parts) {
        let places = &plan.shards[t.place.shard].layout.tensors;
        tensor.n_bytes = parts.iter().map(|&i| places[i].1).sum();
    }
    plan.output_bytes = plan.shards.iter().map(|s| s.layout.file_bytes).sum();
    plan.texts = plan.companions(source, options)?;
    source.check_unchanged()?; // since its headers were read
    Ok(plan)
}

/// The parts of a quantized matrix, codes first and scales second.
fn parts_of(t: &SourceTensor, source_dtype: GgmlType, bnb: Bnb) -> Result<Vec<TensorDecl>> {
    let (rows, cols) = (t.shape[0], t.shape[1]);
    let part = |name: String, dtype, shape: &[u64]| TensorDecl { name, dtype, shape: shape.to_vec() };
    let of = |suffix: &str| format!("{}.{suffix}", t.name);
    if bnb.dtype == WeightType::Int8 {
        let module = t.name.trim_end_matches(".weight");
        return Ok(vec![
            part(t.name.clone(), Dtype::I8, &[rows, cols]),
            part(format!("{module}.SCB"), Dtype::F32, &[rows]),
            part(format!("{module}.weight_format"), Dtype::U8, &[]),
        ]);
    }
    if cols % 2 == 1 {
        return Err(bnb4::odd_row(cols as usize).what(format!("tensor \"{}\"", t.name)));
    }
    let n_blocks = (rows * cols).div_ceil(bnb.blocksize as u64);
    let state = state_json(source_dtype, [rows, cols], bnb, 0.0).len() as u64;
    let mut parts = vec![
        part(t.name.clone(), Dtype::U8, &[rows * cols / 2, 1]),
        part(of("absmax"), if bnb.double_quant { Dtype::U8 } else { Dtype::F32 }, &[n_blocks]),
        part(of("quant_map"), Dtype::F32, &[16]),
        part(of(&format!("quant_state.bitsandbytes__{}", quant_type(bnb))), Dtype::U8, &[state]),
    ];
    if bnb.double_quant {
        let n_outer = n_blocks.div_ceil(NESTED_BLOCKSIZE as u64);
        parts.push(part(of("nested_absmax"), Dtype::F32, &[n_outer]));
        parts.push(part(of("nested_quant_map"), Dtype::F32, &[256]));
    }
    Ok(parts)
}

fn quant_type(bnb: Bnb) -> &'static str {
    if bnb.dtype == WeightType::Fp4 { "fp4" } else { "nf4" }
}

fn torch_name(dtype: GgmlType) -> &'static str {
    match dtype {
        GgmlType::F16 => "float16",
        GgmlType::Bf16 => "bfloat16",
        _ => "float32",
    }
}

fn safetensors_dtype(dtype: GgmlType) -> Dtype {
    match dtype {
        GgmlType::F16 => Dtype::F16,
        GgmlType::Bf16 => Dtype::BF16,
        _ => Dtype::F32,
    }
}

/// The quant state as the library spells it. One with an offset, which is known late, is padded with spaces to a length
/// that is known early.
fn state_json(source_dtype: GgmlType, shape: [u64; 2], bnb: Bnb, offset: f32) -> String {
    let mut text = format!(
        r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{}, {}]"#,
        quant_type(bnb),
        bnb.blocksize,
        torch_name(source_dtype),
        shape[0],
        shape[1]
    );
    if bnb.double_quant {
        let number = json!(f64::from(offset)).to_string();
        let padding = " ".repeat(NUMBER_BYTES.saturating_sub(number.len()));
        text.push_str(&format!(
            r#", "nested_blocksize": {NESTED_BLOCKSIZE}, "nested_dtype": "float32", "nested_offset": {number}}}{padding}"#
        ));
    } else {
        text.push('}');
    }
    text
}

impl BnbPlan {
    /// config.json with its quantization_config, the index, and what is copied.
    fn companions(&self, source: &Checkpoint, options: &BnbOptions) -> Result<Vec<(String, Vec<u8>)>> {
        let pretty = |value: &Value| format!("{value:#}\n").into_bytes();
        let mut config = source.config().fields().clone();
        config.insert("quantization_config".to_owned(), quantization_config(options));
        let mut texts = vec![("config.json".to_owned(), pretty(&Value::Object(config)))];
        if self.shards.len() > 1 {
            let names =
                self.shards.iter().flat_map(|s| s.decls.iter().map(|d| (d.name.clone(), json!(s.name))));
            let total: u64 = self.shards.iter().flat_map(|s| &s.layout.tensors).map(|(_, n)| n).sum();
            let map: Map<String, Value> = names.collect();
            let index = json!({"metadata": {"total_size": total}, "weight_map": map});
            texts.push((INDEX_NAME.to_owned(), pretty(&index)));
        }
        for name in COMPANIONS {
            let Some(bytes) = source.companion(name)? else { continue };
            texts.push((name.to_owned(), bytes));
        }
        Ok(texts)
    }
}

/// As `BitsAndBytesConfig.to_dict` has it; what is not said here has the library's defaults.
fn quantization_config(options: &BnbOptions) -> Value {
    let eight = options.bnb.dtype == WeightType::Int8;
    json!({
        "quant_method": "bitsandbytes",
        "_load_in_4bit": !eight,
        "_load_in_8bit": eight,
        "load_in_4bit": !eight,
        "load_in_8bit": eight,
        "bnb_4bit_quant_type": quant_type(options.bnb),
        "bnb_4bit_use_double_quant": options.bnb.double_quant,
        "bnb_4bit_compute_dtype": torch_name(options.compute_dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
    })
}

/// Writes the folder as planned. It appears complete, on disk and read back, or not at all.
///
/// Errors: `OutputExists`, `Usage` if the output is the source, `NotFinite` and `OutOfRange` with the tensor, `Changed`
/// if a source file was modified meanwhile, `Io`, `Interrupted` once `cancel` is set.
pub fn run_bnb(
    plan: &BnbPlan,
    options: &BnbOptions,
    out: &Path,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<()> {
    let source = std::fs::canonicalize(&plan.source_dir);
    if std::fs::canonicalize(out).is_ok_and(|out| source.is_ok_and(|source| source == out)) {
        return Err(Error::new(ErrorKind::Usage)
            .file(out)
            .what("output")
            .expected("another folder than the source")
            .found("the source"));
    }
    let folder = AtomicFolder::create(out, options.force)?;
    let mut files = Vec::with_capacity(plan.shards.len());
    for shard in &plan.shards {
        let file = folder.file(&shard.name, shard.layout.file_bytes)?;
        files.push(Recorded { file, written: Mutex::default() });
    }
    progress.phase(Phase::Convert, plan.source_bytes, plan.output_bytes);
    let pieces = plan.pieces(options.bnb);
    let collected = plan.collected(&pieces);
    let job =
        Streaming { files: &plan.files, pieces: &pieces, threads: options.threads, sha256: false, cancel };
    stream(job, Scratch::default, |scratch, piece, bytes| {
        let done = Work { plan, bnb: options.bnb, file: &files[piece.file], piece, bytes };
        done.piece(scratch, collected.get(&piece.tensor), progress)
    })?;
    plan.files.iter().try_for_each(InputFile::check_unchanged)?;
    for (shard, file) in plan.shards.iter().zip(&files) {
        file.write_at(0, &shard.layout.header)?;
    }

    progress.phase(Phase::Check, plan.output_bytes, 0);
    for (shard, file) in plan.shards.iter().zip(files) {
        file.commit(shard.layout.file_bytes, progress, cancel)?;
    }
    for (name, bytes) in &plan.texts {
        let file = folder.file(name, bytes.len() as u64)?;
        file.write_at(0, bytes)?;
        file.commit(|_| Ok(()))?;
    }
    folder.commit(|temp| {
        check_cancel(cancel)?;
        Checkpoint::open(temp).map(|_| ())
    })
}

impl BnbPlan {
    /// Pieces of the source, `first_row` and `rows` counting weights.
    fn pieces(&self, bnb: Bnb) -> Vec<Piece> {
        let mut out = Vec::new();
        for (i, (t, tensor)) in self.sources.iter().zip(&self.tensors).enumerate() {
            let size = tensor.source_dtype.block_bytes() as u64;
            let n: u64 = t.shape.iter().product();
            let step = match (tensor.dtype, t.shape.last()) {
                (WeightType::Ggml(_), _) => PIECE_BYTES / size,
                // Whole rows, which share a scale.
                (WeightType::Int8, Some(&cols)) => (PIECE_WEIGHTS / cols.max(1)).max(1) * cols,
                _ => PIECE_WEIGHTS,
            };
            debug_assert!(PIECE_WEIGHTS.is_multiple_of(bnb.blocksize as u64));
            for first in (0..n).step_by(step.max(1) as usize) {
                let rows = step.min(n - first);
                out.push(Piece {
                    tensor: i,
                    first_row: first,
                    rows,
                    file: t.place.shard,
                    offset: t.place.offset + first * size,
                    n_bytes: (rows * size) as usize,
                });
            }
        }
        out.sort_unstable_by_key(|p| (p.file, p.offset));
        out
    }

    /// Room for the scales of the matrices whose scales are quantized, by tensor.
    fn collected(&self, pieces: &[Piece]) -> HashMap<usize, Mutex<Collected>> {
        let mut out = HashMap::new();
        for piece in pieces {
            if self.tensors[piece.tensor].dtype != self.sources[piece.tensor].dtype {
                let collected: &mut Mutex<Collected> = out.entry(piece.tensor).or_default();
                collected.get_mut().unwrap_or_else(PoisonError::into_inner).n_pieces += 1;
            }
        }
        out
    }
}

/// Scales of one matrix so far.
#[derive(Default)]
struct Collected {
    n_pieces: usize,
    /// By first block.
    scales: BTreeMap<u64, Vec<f32>>,
}

/// What a worker keeps between pieces.
#[derive(Default)]
struct Scratch {
    floats: Vec<f32>,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

/// A piece and where it goes.
struct Work<'a> {
    plan: &'a BnbPlan,
    bnb: Bnb,
    file: &'a Recorded,
    piece: &'a Piece,
    bytes: &'a [u8],
}

impl Work<'_> {
    fn tensor(&self) -> &BnbTensor {
        &self.plan.tensors[self.piece.tensor]
    }

    /// Where a part of the tensor lies in the output.
    fn place(&self, part: usize) -> u64 {
        let index = self.plan.parts[self.piece.tensor][part];
        self.plan.shards[self.piece.file].layout.tensors[index].0
    }

    fn piece(
        &self,
        scratch: &mut Scratch,
        collected: Option<&Mutex<Collected>>,
        progress: &dyn Progress,
    ) -> Result<()> {
        if self.piece.first_row == 0 {
            progress.tensor(&self.tensor().name);
        }
        let n_written = match collected {
            None => {
                let size = self.tensor().source_dtype.block_bytes() as u64;
                self.file.write_at(self.place(0) + self.piece.first_row * size, self.bytes)?;
                self.bytes.len()
            }
            Some(collected) => self.quantize(scratch, collected)?,
        };
        progress.bytes(self.bytes.len() as u64, n_written as u64);
        Ok(())
    }

    fn quantize(&self, scratch: &mut Scratch, collected: &Mutex<Collected>) -> Result<usize> {
        let Scratch { floats, codes, scales } = scratch;
        let (n, cols) = (self.piece.rows as usize, self.tensor().shape[1] as usize);
        floats.resize(n, 0.0);
        dequantize(self.tensor().source_dtype.into(), self.bytes, 0, None, floats);
        let about = |e: Error| {
            let file = &self.plan.files[self.piece.file].path;
            e.file(file).what(format!(
                "tensor \"{}\", weights from {} on",
                self.tensor().name,
                self.piece.first_row
            ))
        };
        let first = self.piece.first_row;
        if self.bnb.dtype == WeightType::Int8 {
            codes.resize(n, 0);
            scales.clear();
            for (row, codes) in floats.chunks(cols).zip(codes.chunks_mut(cols)) {
                scales.push(bnb8::quantize_row(row, codes).map_err(about)?);
            }
            self.file.write_at(self.place(0) + first, codes)?;
            self.file.write_at(self.place(1) + 4 * (first / cols as u64), &bytes_of(scales))?;
        } else {
            codes.resize(n / 2, 0);
            scales.resize(n.div_ceil(self.bnb.blocksize), 0.0);
            bnb4::quantize(self.bnb.dtype, self.bnb.blocksize, floats, codes, scales).map_err(about)?;
            self.file.write_at(self.place(0) + first / 2, codes)?;
            if !self.bnb.double_quant {
                let block = first / self.bnb.blocksize as u64;
                self.file.write_at(self.place(1) + 4 * block, &bytes_of(scales))?;
            }
        }
        let mut all = collected.lock().unwrap_or_else(PoisonError::into_inner);
        if self.bnb.double_quant && self.bnb.dtype != WeightType::Int8 {
            all.scales.insert(first, std::mem::take(scales));
        }
        all.n_pieces -= 1;
        if all.n_pieces == 0 {
            let scales: Vec<f32> = std::mem::take(&mut all.scales).into_values().flatten().collect();
            drop(all);
            self.finish(&scales)?;
        }
        Ok(codes.len())
    }

    /// What a matrix has once.
    fn finish(&self, scales: &[f32]) -> Result<()> {
        let t = self.tensor();
        if self.bnb.dtype == WeightType::Int8 {
            return self.file.write_at(self.place(2), &[0]);
        }
        let values = t.dtype.code_values().map_or(&[][..], |values| values);
        self.file.write_at(self.place(2), &bytes_of(values))?;
        let shape = [t.shape[0], t.shape[1]];
        let mut offset = 0.0;
        if self.bnb.double_quant {
            let nested = quantize_scales(scales);
            self.file.write_at(self.place(1), &nested.codes)?;
            self.file.write_at(self.place(4), &bytes_of(&nested.absmax))?;
            self.file.write_at(self.place(5), &bytes_of(&dynamic_map()))?;
            offset = nested.offset;
        }
        self.file.write_at(self.place(3), state_json(t.source_dtype, shape, self.bnb, offset).as_bytes())
    }
}

fn bytes_of(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A file that remembers what was written to it.
struct Recorded {
    file: AtomicFile,
    /// Range and hash.
    written: Mutex<Vec<(Range<u64>, u64)>>,
}

impl Recorded {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_at(offset, bytes)?;
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.push((offset..offset + bytes.len() as u64, damage_hash(bytes)));
        Ok(())
    }

    /// Forces the file to disk and reads back every byte of it.
    fn commit(self, file_bytes: u64, progress: &dyn Progress, cancel: &AtomicBool) -> Result<()> {
        let mut written = self.written.into_inner().unwrap_or_else(PoisonError::into_inner);
        written.sort_unstable_by_key(|(range, _)| range.start);
        let damaged = |at: u64| {
            Error::new(ErrorKind::Io)
                .at(at)
                .expected("the bytes that were written")
                .found("others, or none, when read back")
                .hint("the disk or the memory is faulty; nothing was kept")
        };
        self.file.commit(|temp| {
            let (mut on_disk, mut at) = (DiskFile::open(temp)?, 0);
            for (range, expected) in written {
                check_cancel(cancel)?;
                let n_bytes = range.end - range.start;
                if range.start != at || damage_hash(on_disk.read(at, n_bytes as usize)?) != expected {
                    return Err(damaged(range.start));
                }
                at = range.end;
                progress.bytes(n_bytes, 0);
            }
            if at == file_bytes { Ok(()) } else { Err(damaged(at)) }
        })
    }
}
