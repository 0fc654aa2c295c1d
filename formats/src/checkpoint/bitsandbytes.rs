//! Matrices as bitsandbytes saves them: codes in one tensor, and beside it what they need to become numbers.
//!
//! | tensor | 4 bits | 8 bits |
//! |---|---|---|
//! | `P.weight` | two codes a byte, rows one after the other, viewed as U8, F16, BF16 or F32 | I8 (rows, cols) |
//! | scales | `P.weight.absmax`: F32 per block, or U8 if they are quantized in turn ("nested") | `P.SCB`: F32 per row |
//! | `P.weight.quant_map` | F32 (16), what the codes stand for | |
//! | `P.weight.nested_absmax`, `.nested_quant_map` | F32 per block of scales, F32 (256) | |
//! | `P.weight.quant_state.bitsandbytes__nf4` or `__fp4` | JSON: block sizes, dtype, shape, offset | |
//! | `P.weight_format` | | U8, 0: by row |
//!
//! Source: `QuantState.as_dict` and `Linear8bitLt` of bitsandbytes 0.50.

use super::{Place, RawTensor, Shard, SourceTensor, describe_tensor, dtype_of};
use crate::json::{Fault, Strict, describe, shorten};
use crate::limits::{BNB_BLOCKSIZES, QUANT_STATE_BYTES_MAX};
use crate::{Error, ErrorKind, GgmlType, Result, WeightType, arch};
use safetensors::Dtype;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of scales read at a time.
const CHECK_BYTES: usize = 1 << 20;
/// How far a stored code value may be from the library's, which is computed in several ways there.
const QUANT_MAP_TOLERANCE: f32 = 1e-6;

/// The largest numbers of the types that weights are rounded to.
const F16_MAX: f32 = 65504.0;
const BF16_MAX: f32 = f32::from_bits(0x7f7f_0000);
/// Weights of int8 are `code * scale / 127`, whose product has to be finite as well.
const INT8_SCALE_MAX: f32 = f32::MAX / 128.0;

/// What makes numbers of a matrix of codes: `weight = value(code) * scale`, one scale for `blocksize` consecutive
/// weights, whatever rows they are in.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantState {
    /// Weights that share a scale; of [`WeightType::Int8`] a row.
    pub blocksize: u64,
    /// What the library's dequantization rounds to: F32, F16 or BF16.
    pub dtype: GgmlType,
    /// The scales: f32, or a byte each if `nested`.
    pub absmax: Place,
    /// How a byte becomes a scale.
    pub nested: Option<Nested>,
    /// No scale is larger; the largest, or a little more where scales are quantized.
    pub largest: f32,
}

/// Scales that are quantized themselves: `scale = map[byte] * absmax + offset`.
#[derive(Clone, Debug, PartialEq)]
pub struct Nested {
    /// Scales that share an `absmax`.
    pub blocksize: u64,
    /// f32 each.
    pub absmax: Place,
    /// What a byte stands for.
    pub map: Arc<[f32; 256]>,
    /// Mean of the scales before they were quantized.
    pub offset: f32,
}

impl QuantState {
    /// Bytes that the scales take, all told; the code tables are left out.
    pub fn n_bytes(&self) -> u64 {
        self.absmax.n_bytes + self.nested.as_ref().map_or(0, |n| n.absmax.n_bytes)
    }
}

/// `quantization_config` of config.json, as far as it concerns reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declared {
    /// `load_in_4bit`.
    FourBit,
    /// `load_in_8bit`.
    EightBit,
}

impl Declared {
    /// Reads the object. Other methods are `Unsupported`. Files from before `quant_method` name only the width.
    pub(super) fn parse(config: &Value) -> Result<Self> {
        let error = |kind| {
            Error::new(kind)
                .what("quantization_config")
                .expected("bitsandbytes with load_in_4bit or load_in_8bit")
        };
        let Value::Object(fields) = config else {
            return Err(error(ErrorKind::WrongType).found(describe(config)));
        };
        match fields.get("quant_method") {
            None => {}
            Some(Value::String(method)) if method == "bitsandbytes" => {}
            Some(other) => {
                let hint = "use the unquantized model, or one that bitsandbytes quantized";
                return Err(error(ErrorKind::Unsupported).found(describe(other)).hint(hint));
            }
        }
        let flag = |name| super::config::flag(fields, name).map(|flag| flag == Some(true));
        match (flag("load_in_4bit")?, flag("load_in_8bit")?) {
            (true, false) => Ok(Self::FourBit),
            (false, true) => Ok(Self::EightBit),
            (true, true) => Err(error(ErrorKind::Inconsistent).found("both")),
            (false, false) => Err(error(ErrorKind::Missing).found("neither")),
        }
    }

    /// What is odd about these tensors under such a configuration. The tensors decide how they are read.
    pub(super) fn warning(declared: Option<Self>, tensors: &[SourceTensor]) -> Option<String> {
        let has = |wanted: fn(WeightType) -> bool| tensors.iter().any(|t| wanted(t.dtype));
        let four = has(|ty| matches!(ty, WeightType::Nf4 | WeightType::Fp4));
        let eight = has(|ty| ty == WeightType::Int8);
        let found = match (four, eight) {
            (false, false) => "no tensor is quantized",
            (true, false) => "tensors have 4 bits",
            (false, true) => "tensors have 8 bits",
            (true, true) => "tensors have 4 and 8 bits",
        };
        match declared {
            None if four || eight => Some(format!("config.json has no quantization_config, but {found}")),
            Some(Self::FourBit) if !four || eight => {
                Some(format!("quantization_config says 4 bits, but {found}"))
            }
            Some(Self::EightBit) if !eight || four => {
                Some(format!("quantization_config says 8 bits, but {found}"))
            }
            _ => None,
        }
    }
}

/// The tensor that a tensor is there for, by its name; `None` for one that stands for itself.
fn owner(name: &str) -> Option<String> {
    if let Some((owner, _)) = name.split_once(".quant_state.") {
        return Some(owner.to_owned());
    }
    for part in [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"] {
        if let Some(owner) = name.strip_suffix(part) {
            return Some(owner.to_owned());
        }
    }
    let module = name.strip_suffix(".SCB").or_else(|| name.strip_suffix(".weight_format"))?;
    Some(format!("{module}.weight"))
}

/// Whether a checkpoint of `n_layer` layers can have a tensor of this name, as it is or in bitsandbytes' parts.
pub(super) fn is_known(name: &str, n_layer: usize) -> bool {
    arch::is_hf_name(name, n_layer) || owner(name).is_some_and(|owner| arch::is_hf_name(&owner, n_layer))
}

/// Puts codes, scales and tables together; every other tensor stays what it is.
pub(super) fn assemble(raw: &[RawTensor], shards: &[Shard]) -> Result<Vec<SourceTensor>> {
    let by_name = raw.iter().map(|t| (t.name.as_str(), t)).collect();
    let parts = Parts { by_name, shards };
    let mut out = Vec::with_capacity(raw.iter().filter(|t| owner(&t.name).is_none()).count());
    for t in raw {
        match owner(&t.name) {
            None => out.push(parts.tensor(t)?),
            Some(owner) if parts.by_name.contains_key(owner.as_str()) => {}
            Some(owner) => {
                return Err(parts
                    .error(ErrorKind::Unexpected, t)
                    .expected(format!("a tensor \"{}\" that it belongs to", shorten(&owner)))
                    .found("none"));
            }
        }
    }
    Ok(out)
}

struct Parts<'a> {
    by_name: BTreeMap<&'a str, &'a RawTensor>,
    shards: &'a [Shard],
}

impl Parts<'_> {
    /// An error about a raw tensor.
    fn error(&self, kind: ErrorKind, t: &RawTensor) -> Error {
        let error = Error::new(kind).at(t.place.offset).what(describe_tensor(&t.name));
        match self.shards.get(t.place.shard) {
            Some(shard) => error.file(&shard.path),
            None => error,
        }
    }

    fn find(&self, name: &str) -> Option<&RawTensor> {
        self.by_name.get(name).copied()
    }

    /// A part of `of` that must be there.
    fn part(&self, of: &RawTensor, name: &str) -> Result<&RawTensor> {
        self.find(name).ok_or_else(|| {
            self.error(ErrorKind::Missing, of)
                .expected(format!("a tensor \"{}\" beside it", shorten(name)))
                .found("none")
        })
    }

    fn tensor(&self, t: &RawTensor) -> Result<SourceTensor> {
        let part = |suffix: &str| self.find(&format!("{}.{suffix}", t.name));
        let states = [WeightType::Nf4, WeightType::Fp4].map(|ty| Some((ty, part(state_suffix(ty))?)));
        let has_parts = ["absmax", "quant_map", "nested_absmax"].iter().any(|suffix| part(suffix).is_some());
        let (dtype, shape, state) = match states {
            [Some((ty, state)), None] | [None, Some((ty, state))] => self.four_bit(t, ty, state)?,
            [Some(_), Some((_, state))] => {
                return Err(self
                    .error(ErrorKind::Inconsistent, state)
                    .expected("one quant state")
                    .found("two"));
            }
            [None, None] if t.dtype == Dtype::I8 => self.int8(t)?,
            [None, None] if has_parts || t.dtype == Dtype::U8 => {
                return Err(self
                    .error(ErrorKind::Missing, t)
                    .expected("a quant state beside it (.quant_state.bitsandbytes__nf4 or __fp4)")
                    .found("none"));
            }
            [None, None] => {
                let dtype = dtype_of(t.dtype).ok_or_else(|| {
                    let error = self.error(ErrorKind::Unsupported, t).expected("F32, F16 or BF16");
                    error.found(format!("{:?}", t.dtype))
                })?;
                return Ok(SourceTensor::new(t, dtype.into(), t.shape.clone(), None));
            }
        };
        Ok(SourceTensor::new(t, dtype, shape, Some(Box::new(state))))
    }

    fn four_bit(
        &self,
        t: &RawTensor,
        ty: WeightType,
        state: &RawTensor,
    ) -> Result<(WeightType, Vec<u64>, QuantState)> {
        let fields = self.state_fields(state)?;
        let wrong = |kind, name: &str| {
            let found = fields.get(name).map_or("nothing".to_owned(), describe);
            self.error(kind, state).found(format!("{name}: {found}"))
        };
        let text = |name: &str| fields.get(name).and_then(Value::as_str);
        let quant_type = if ty == WeightType::Nf4 { "nf4" } else { "fp4" };
        if text("quant_type") != Some(quant_type) {
            return Err(wrong(ErrorKind::Inconsistent, "quant_type").expected(format!("\"{quant_type}\"")));
        }
        // No code is beyond 1, so that no weight is larger than its scale.
        let (dtype, most) = match text("dtype") {
            Some("float32") => (GgmlType::F32, f32::MAX),
            Some("float16") => (GgmlType::F16, F16_MAX),
            Some("bfloat16") => (GgmlType::Bf16, BF16_MAX),
            _ => return Err(wrong(ErrorKind::UnknownType, "dtype").expected("float32, float16 or bfloat16")),
        };
        let blocksize = |name: &str| {
            let size = fields.get(name).and_then(Value::as_u64).filter(|n| BNB_BLOCKSIZES.contains(n));
            size.ok_or_else(|| {
                wrong(ErrorKind::OutOfRange, name).expected(format!("one of {BNB_BLOCKSIZES:?}"))
            })
        };
        let shape = fields.get("shape").and_then(Value::as_array).map(|dims| dims.iter().map(Value::as_u64));
        let shape: Option<Vec<u64>> = shape.and_then(Iterator::collect);
        let Some(&[rows, cols]) = shape.as_deref() else {
            return Err(wrong(ErrorKind::BadShape, "shape").expected("(rows, cols)"));
        };
        let Some(n) = rows.checked_mul(cols).filter(|&n| n > 0) else {
            return Err(wrong(ErrorKind::BadShape, "shape").expected("a product that fits 64 bits, above 0"));
        };
        if cols % 2 == 1 {
            return Err(
                wrong(ErrorKind::Unsupported, "shape").expected("rows of whole bytes: an even number")
            );
        }
        self.check_packed(t, n / 2)?;

        let blocksize = blocksize("blocksize")?;
        let n_blocks = n.div_ceil(blocksize);
        let absmax = self.part(t, &format!("{}.absmax", t.name))?;
        if absmax.dtype == Dtype::BF16 {
            return Err(self
                .error(ErrorKind::Unsupported, absmax)
                .expected("F32 or U8")
                .found("BF16: the library repacked the weights for its own use before they were saved")
                .hint("save the checkpoint before its first forward pass"));
        }
        let map = self.part(t, &format!("{}.quant_map", t.name))?;
        self.check_quant_map(map, ty)?;
        let (nested, largest) = match self.find(&format!("{}.nested_absmax", t.name)) {
            None => {
                self.check_list(absmax, Dtype::F32, n_blocks)?;
                (None, self.check_scales(absmax, 0.0, most)?)
            }
            Some(nested_absmax) => {
                self.check_list(absmax, Dtype::U8, n_blocks)?;
                let blocksize = self.nested_blocksize(&fields, state)?;
                let offset = fields.get("nested_offset").and_then(Value::as_f64).map(|x| x as f32);
                let Some(offset) = offset.filter(|x| x.is_finite()) else {
                    return Err(wrong(ErrorKind::WrongType, "nested_offset").expected("a finite number"));
                };
                if text("nested_dtype") != Some("float32") {
                    return Err(wrong(ErrorKind::Unsupported, "nested_dtype").expected("\"float32\""));
                }
                self.check_list(nested_absmax, Dtype::F32, n_blocks.div_ceil(blocksize))?;
                let largest = self.check_scales(nested_absmax, offset, most)?;
                let map = self.part(t, &format!("{}.nested_quant_map", t.name))?;
                (
                    Some(Nested {
                        blocksize,
                        absmax: nested_absmax.place,
                        map: self.nested_map(map)?,
                        offset,
                    }),
                    largest,
                )
            }
        };
        Ok((ty, vec![rows, cols], QuantState { blocksize, dtype, absmax: absmax.place, nested, largest }))
    }

    fn int8(&self, t: &RawTensor) -> Result<(WeightType, Vec<u64>, QuantState)> {
        let module = t.name.strip_suffix(".weight").unwrap_or(&t.name);
        let &[rows, cols] = t.shape.as_slice() else {
            return Err(self
                .error(ErrorKind::BadShape, t)
                .expected("(rows, cols)")
                .found(format!("{:?}", t.shape)));
        };
        let scales = self.part(t, &format!("{module}.SCB"))?;
        self.check_list(scales, Dtype::F32, rows)?;
        let largest = self.check_scales(scales, 0.0, INT8_SCALE_MAX)?;
        if let Some(format) = self.find(&format!("{module}.weight_format")) {
            self.check_list(format, Dtype::U8, 1)?;
            let bytes = self.read(format)?;
            if bytes != [0] {
                return Err(self
                    .error(ErrorKind::Unsupported, format)
                    .expected("0, weights by row")
                    .found(format!("{bytes:?}")));
            }
        }
        let state =
            QuantState { blocksize: cols, dtype: GgmlType::F32, absmax: scales.place, nested: None, largest };
        Ok((WeightType::Int8, t.shape.clone(), state))
    }

    /// The JSON text in a tensor.
    fn state_fields(&self, state: &RawTensor) -> Result<Map<String, Value>> {
        if state.dtype != Dtype::U8 || state.place.n_bytes > QUANT_STATE_BYTES_MAX {
            return Err(self
                .error(ErrorKind::BadJson, state)
                .expected(format!("at most {QUANT_STATE_BYTES_MAX} bytes of JSON in a U8 tensor"))
                .found(format!("{} bytes of {}", state.place.n_bytes, state.dtype)));
        }
        let bytes = self.read(state)?;
        let fault = Fault::default();
        let path = self.shards.get(state.place.shard).map(|s| s.path.as_path()).unwrap_or("".as_ref());
        let parsed = fault.parse(&bytes, path, state.place.offset, Strict { fault: &fault, depth: 0 });
        match parsed {
            Ok(Value::Object(fields)) => Ok(fields),
            Ok(other) => {
                Err(self.error(ErrorKind::BadJson, state).expected("a JSON object").found(describe(&other)))
            }
            Err(e) if e.details().what.is_none() => Err(e.what(describe_tensor(&state.name))),
            Err(e) => Err(e),
        }
    }

    fn nested_blocksize(&self, fields: &Map<String, Value>, state: &RawTensor) -> Result<u64> {
        let size = fields.get("nested_blocksize").and_then(Value::as_u64);
        size.filter(|n| BNB_BLOCKSIZES.contains(n)).ok_or_else(|| {
            let found = fields.get("nested_blocksize").map_or("nothing".to_owned(), describe);
            self.error(ErrorKind::OutOfRange, state)
                .expected(format!("nested_blocksize: one of {BNB_BLOCKSIZES:?}"))
                .found(found)
        })
    }

    /// The packed codes have the bytes that the shape asks for, under whatever dtype and shape.
    fn check_packed(&self, t: &RawTensor, n_bytes: u64) -> Result<()> {
        let storage = matches!(t.dtype, Dtype::U8 | Dtype::BF16 | Dtype::F16 | Dtype::F32);
        if !storage {
            return Err(self
                .error(ErrorKind::WrongType, t)
                .expected("packed codes, stored as U8, BF16, F16 or F32")
                .found(format!("{}", t.dtype)));
        }
        if t.place.n_bytes != n_bytes {
            return Err(self
                .error(ErrorKind::Inconsistent, t)
                .expected(format!("{n_bytes} bytes of packed codes, as its quant state's shape asks for"))
                .found(t.place.n_bytes));
        }
        Ok(())
    }

    /// A tensor of `n` numbers; a scalar is one.
    fn check_list(&self, t: &RawTensor, dtype: Dtype, n: u64) -> Result<()> {
        let found: u64 = t.shape.iter().product();
        if t.dtype == dtype && found == n {
            return Ok(());
        }
        Err(self
            .error(ErrorKind::Inconsistent, t)
            .expected(format!("{n} numbers of type {dtype}"))
            .found(format!("{} {:?}", t.dtype, t.shape)))
    }

    /// No scale is negative, and after `offset` is added none is above `most`. Returns the largest then.
    fn check_scales(&self, t: &RawTensor, offset: f32, most: f32) -> Result<f32> {
        let mut largest = 0f32;
        let mut bytes = Vec::new();
        let mut done = 0;
        while done < t.place.n_bytes {
            bytes.resize((t.place.n_bytes - done).min(CHECK_BYTES as u64) as usize, 0);
            self.read_at(t, done, &mut bytes)?;
            // A NaN is in no range.
            let bad = f32s(&bytes).position(|x| !(x >= 0.0 && x + offset.abs() <= most));
            if let Some(i) = bad {
                let found = f32s(&bytes).nth(i).unwrap_or(f32::NAN);
                let at = t.place.offset + done + 4 * i as u64;
                return Err(self
                    .error(ErrorKind::NotFinite, t)
                    .at(at)
                    .expected(format!("scales of finite weights: from 0 to {most:e}"))
                    .found(found));
            }
            largest = f32s(&bytes).fold(largest, f32::max);
            done += bytes.len() as u64;
        }
        Ok(largest + offset.abs())
    }

    fn check_quant_map(&self, t: &RawTensor, ty: WeightType) -> Result<()> {
        self.check_list(t, Dtype::F32, 16)?;
        let bytes = self.read(t)?;
        let values = ty.code_values().into_iter().flatten();
        let differs = |got: f32, want: f32| got.is_nan() || (got - want).abs() > QUANT_MAP_TOLERANCE;
        match f32s(&bytes).zip(values).find(|(got, want)| differs(*got, **want)) {
            None => Ok(()),
            Some((got, want)) => Err(self
                .error(ErrorKind::Inconsistent, t)
                .expected(format!("the values of {ty}, {want} here"))
                .found(got)),
        }
    }

    fn nested_map(&self, t: &RawTensor) -> Result<Arc<[f32; 256]>> {
        self.check_list(t, Dtype::F32, 256)?;
        let bytes = self.read(t)?;
        let mut map = Arc::new([0.0; 256]);
        let values = Arc::make_mut(&mut map).iter_mut();
        for (to, x) in values.zip(f32s(&bytes)) {
            if !(-1.0..=1.0).contains(&x) {
                return Err(self.error(ErrorKind::OutOfRange, t).expected("values from -1 to 1").found(x));
            }
            *to = x;
        }
        Ok(map)
    }

    fn read(&self, t: &RawTensor) -> Result<Vec<u8>> {
        let mut bytes = vec![0; t.place.n_bytes as usize];
        self.read_at(t, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn read_at(&self, t: &RawTensor, offset: u64, buf: &mut [u8]) -> Result<()> {
        let Some(shard) = self.shards.get(t.place.shard) else {
            return Err(self.error(ErrorKind::Usage, t));
        };
        shard.read_at(t.place.offset.saturating_add(offset), buf)
    }
}

/// Under which name a quant state of this type is.
fn state_suffix(ty: WeightType) -> &'static str {
    match ty {
        WeightType::Fp4 => "quant_state.bitsandbytes__fp4",
        _ => "quant_state.bitsandbytes__nf4",
    }
}

fn f32s(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))
}
