//! torch tensors where they are: `DLPack`'s C exchange API (1.3) tells a tensor's memory without making an object of it.
//!
//! Python says once what a tensor is ([`take_tensors`]); a torch that has no such API gives NumPy arrays instead.

#![expect(unsafe_code, reason = "torch's description of its tensors, by a C structure")]

use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;
use std::slice::from_raw_parts;

use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyType};

/// How an element is stored: `DLPack`'s code of the type, and bits.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind(pub(crate) u8, pub(crate) u8);

impl Kind {
    pub(crate) fn bytes(self) -> usize {
        usize::from(self.1) / 8
    }
}

/// Where a tensor is, as long as nothing runs that could change that.
pub(crate) struct View<'a> {
    /// 0 where there are no elements.
    pub(crate) address: usize,
    pub(crate) kind: Kind,
    pub(crate) shape: &'a [i64],
    /// In elements.
    pub(crate) strides: &'a [i64],
}

impl View<'_> {
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    /// Whether elements follow each other as in C.
    pub(crate) fn is_contiguous(&self) -> bool {
        let mut dense = 1;
        self.shape.contains(&0)
            || self.shape.iter().zip(self.strides).rev().all(|(&size, &stride)| {
                let fits = size == 1 || stride == dense;
                dense *= size;
                fits
            })
    }
}

/// The API of torch, and whose objects it describes.
struct Api {
    tensor: Py<PyType>,
    /// The attribute of its subclasses that leave their operators to torch.
    dispatch: Py<PyAny>,
    describe: Describe,
}

static API: PyOnceLock<Api> = PyOnceLock::new();

/// Takes tensors of this type from now on, if torch can describe them. Whether it can.
#[pyfunction]
pub(crate) fn take_tensors(tensor: &Bound<'_, PyType>) -> bool {
    let py = tensor.py();
    let api = || {
        let dispatch = tensor.getattr(DISPATCH).ok()?.unbind();
        describe_of(tensor).map(|describe| Api { tensor: tensor.clone().unbind(), dispatch, describe })
    };
    API.get(py).is_some() || api().is_some_and(|api| API.set(py, api).is_ok())
}

fn describe_of(tensor: &Bound<'_, PyType>) -> Option<Describe> {
    let capsule = tensor.getattr("__dlpack_c_exchange_api__").ok()?;
    let api = capsule.cast::<PyCapsule>().ok()?.pointer_checked(Some(NAME)).ok()?.cast::<ExchangeApi>();
    // SAFETY: a capsule of this name has a structure that begins so, in all versions, and lives as long as its library,
    // which Python does not unload.
    let version = unsafe { api.as_ref().version };
    // SAFETY: of this version it is of this type.
    if version.major == 1 && version.minor >= 3 { unsafe { api.as_ref().describe } } else { None }
}

/// Whether a tensor's elements are those of its memory: a class with operators of its own may have them elsewhere, as fake
/// tensors, results of collectives and other wrappers do, and torch then tells an address that means nothing.
pub(crate) fn is_plain(tensor: &Bound<'_, PyAny>) -> bool {
    let (py, class) = (tensor.py(), tensor.get_type());
    API.get(py).is_some_and(|api| {
        class.is(&api.tensor)
            || class.getattr(intern!(py, DISPATCH)).is_ok_and(|dispatch| dispatch.is(&api.dispatch))
    })
}

/// Calls `f` with where a tensor is; `None` of what is no tensor.
pub(crate) fn view<R>(object: &Bound<'_, PyAny>, f: impl FnOnce(View<'_>) -> R) -> PyResult<Option<R>> {
    let py = object.py();
    let Some(api) = API.get(py) else { return Ok(None) };
    // SAFETY: both are Python objects, and Python is attached.
    if unsafe { ffi::PyObject_TypeCheck(object.as_ptr(), api.tensor.as_ptr().cast()) } == 0 {
        return Ok(None);
    }
    let mut tensor = DlTensor::EMPTY;
    // SAFETY: the object is of the type that the function is for, or of one derived from it.
    if unsafe { (api.describe)(object.as_ptr(), &raw mut tensor) } != 0 {
        return Err(PyErr::fetch(py));
    }
    let DlTensor { data, device, dims, kind, lanes, shape, strides, offset } = tensor;
    let on_host = matches!(device.kind, DEVICE_CPU | DEVICE_CUDA_HOST | DEVICE_ROCM_HOST) && lanes == 1;
    // SAFETY: as many numbers each, which stay as they are while nobody else can change the tensor; `f`, which has
    // them no longer, does not.
    let (shape, strides) = unsafe { (numbers(shape, dims), numbers(strides, dims)) };
    let view = View { address: data.addr() + offset as usize, kind, shape, strides };
    let has_memory = !data.is_null() || view.len() == 0;
    if !on_host || !has_memory {
        return Err(PyValueError::new_err("no memory of the CPU"));
    }
    Ok(Some(f(view)))
}

/// # Safety
/// At `start` there are so many numbers.
unsafe fn numbers<'a>(start: *const i64, count: c_int) -> &'a [i64] {
    // SAFETY: as the caller says; of none there may be a null pointer.
    if count == 0 { &[] } else { unsafe { from_raw_parts(start, count as usize) } }
}

/// The elements of a tensor, which are in place one after another as long as this has it.
pub(crate) struct Elements<'py, T> {
    _tensor: Bound<'py, PyAny>,
    start: NonNull<T>,
    len: usize,
}

impl<'py, T> Elements<'py, T> {
    /// # Safety
    /// A tensor is at `address`, of so many elements that are any bits of a `T`, C-contiguous, aligned.
    pub(crate) unsafe fn new(tensor: Bound<'py, PyAny>, address: usize, len: usize) -> Self {
        let start =
            NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap_or(NonNull::dangling());
        Self { _tensor: tensor, start, len }
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        // SAFETY: 1. as `new` was promised; 2. as long as the tensor is referred to, torch keeps its memory where it is,
        // unless someone puts it elsewhere during a call: to keep out of a running call is the caller's, as it is with
        // torch's own operators.
        unsafe { from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn as_slice_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; nobody else has the memory of an output.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

const DISPATCH: &str = "__torch_dispatch__";
const NAME: &CStr = c"dlpack_exchange_api";
const DEVICE_CPU: i32 = 1;
const DEVICE_CUDA_HOST: i32 = 3;
const DEVICE_ROCM_HOST: i32 = 11;

type Describe = unsafe extern "C" fn(*mut ffi::PyObject, *mut DlTensor) -> c_int;

// The structures are those of dlpack.h 1.3: `DLPackExchangeAPI` and `DLTensor`.

#[repr(C)]
struct ExchangeApi {
    version: Version,
    previous: *const c_void,
    allocate: *const c_void,
    export: *const c_void,
    import: *const c_void,
    describe: Option<Describe>,
    current_stream: *const c_void,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Version {
    major: u32,
    minor: u32,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: Device,
    dims: i32,
    kind: Kind,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    offset: u64,
}

#[repr(C)]
struct Device {
    kind: i32,
    number: i32,
}

impl DlTensor {
    const EMPTY: Self = Self {
        data: std::ptr::null_mut(),
        device: Device { kind: 0, number: 0 },
        dims: 0,
        kind: Kind(0, 0),
        lanes: 0,
        shape: std::ptr::null(),
        strides: std::ptr::null(),
        offset: 0,
    };
}
