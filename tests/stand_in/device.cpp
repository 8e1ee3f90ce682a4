// CUDA tensors that live in the CPU's memory: a stand-in for a GPU in tests.
//
// Whatever is called on them runs on the CPU over the same memory, by a fallback of the CUDA dispatch key. What a GPU does otherwise is
// kept: tensors of two devices do not mix, a copy to the CPU that nobody waits for has not arrived, and calls that would wait for the
// device are warned of or refused, as `torch.cuda.set_sync_debug_mode` does.
//
// What is not: copies to the device arrive at once, numbers on the CPU ([] in shape) go with any operator, and which operators wait is a list.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

using at::CUDAHooksArgs;
using at::CUDAHooksInterface;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::Stream;
using torch::jit::Stack;

namespace {

const Device GPU(DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, GPU); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, GPU); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct Hooks final : CUDAHooksInterface {
  explicit Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetDefaultCPUAllocator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::globalContext().defaultGenerator(at::kCPU);
  }
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks);

// Waiting ---------------------------------------------------------------------------------------------------------------------------

enum class Waits { ALLOWED = 0, WARNED = 1, REFUSED = 2 };

std::mutex lock;
Waits mode = Waits::ALLOWED;
std::vector<std::pair<Tensor, Tensor>> under_way;  // (where on the CPU, what)

void arrive() {
  std::vector<std::pair<Tensor, Tensor>> arrived;
  {
    std::lock_guard<std::mutex> guard(lock);
    arrived.swap(under_way);
  }
  for (auto& [where, what] : arrived) where.copy_(what);
}

void wait(const std::string& name) {
  arrive();
  TORCH_CHECK(mode != Waits::REFUSED, "called a synchronizing CUDA operation: ", name);
  if (mode == Waits::WARNED) TORCH_WARN("called a synchronizing CUDA operation: ", name);
}

// Memory ----------------------------------------------------------------------------------------------------------------------------

bool on_gpu(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == DeviceType::CUDA;
}

// The same memory as a tensor of another device.
Tensor seen_on(const Tensor& tensor, Device device, DispatchKey key) {
  auto* owner = new c10::Storage(tensor.storage());
  auto drop = [](void* pointer) { delete static_cast<c10::Storage*>(pointer); };
  c10::Storage storage(
      c10::Storage::use_byte_size_t(),
      owner->nbytes(),
      c10::DataPtr(owner->mutable_data(), owner, drop, device),
      c10::GetDefaultCPUAllocator(),
      /*resizable=*/true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) out._set_conj(true);
  if (tensor.is_neg()) out._set_neg(true);
  return out;
}

Tensor to_host(const Tensor& tensor) {
  if (!on_gpu(tensor)) return tensor;
  return seen_on(tensor, at::kCPU, DispatchKey::CPU);
}

Tensor to_gpu(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
  // Zeros that have no memory (tangents that are not there).
  if (tensor._is_zerotensor()) return to_gpu(at::zeros(tensor.sizes(), tensor.options()));
  return seen_on(tensor, GPU, DispatchKey::CUDA);
}

// An output that the CPU's kernel resized or moved.
void follow(const Tensor& tensor, const Tensor& host) {
  if (!on_gpu(tensor)) return;
  if (host.sizes() == tensor.sizes() && host.strides() == tensor.strides() &&
      host.const_data_ptr() == tensor.const_data_ptr())
    return;
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(to_gpu(host).storage());
  impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
}

// Calls -----------------------------------------------------------------------------------------------------------------------------

const std::set<std::string> SIZES_FROM_VALUES = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::equal", "aten::bincount"};
const std::set<std::string> INDEXING = {
    "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
const std::set<std::string> FOR_TWO_DEVICES = {"aten::copy_", "aten::set_", "aten::resize_as_"};

struct Arguments {
  bool on_gpu = false, on_cpu = false, to_cpu = false, by_mask = false;
  std::vector<Tensor> originals;  // one for each argument; undefined for those that are no tensor

  Tensor host(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (::on_gpu(tensor)) on_gpu = true;
    else if (tensor.device().is_cpu() && tensor.dim() > 0) on_cpu = true;
    return to_host(tensor);
  }

  Arguments(const c10::FunctionSchema& schema, Stack& stack) : originals(schema.arguments().size()) {
    const auto count = originals.size();
    for (size_t i = 0; i < count; ++i) {
      auto& value = stack[stack.size() - count + i];
      if (value.isTensor()) {
        originals[i] = value.toTensor();
        value = host(originals[i]);
      } else if (value.isTensorList()) {
        c10::List<Tensor> hosts;
        for (const Tensor& tensor : value.toTensorVector()) hosts.push_back(host(tensor));
        value = hosts;
      } else if (value.isOptionalTensorList()) {
        c10::List<std::optional<Tensor>> hosts;
        for (std::optional<Tensor> tensor : value.toOptionalTensorList()) {
          by_mask |= tensor && tensor->scalar_type() == at::kBool;
          hosts.push_back(tensor ? std::optional<Tensor>(host(*tensor)) : std::nullopt);
        }
        value = hosts;
      } else if (value.isDevice()) {
        to_cpu = value.toDevice().is_cpu();
        TORCH_CHECK(to_cpu || value.toDevice().index() <= 0, "CUDA error: invalid device ordinal");
        if (!to_cpu) value = Device(at::kCPU);
      } else if (schema.arguments()[i].name() == "pin_memory") {
        value = c10::IValue();
      }
    }
  }
};

// The argument that a returned tensor is, where the operator writes into its arguments.
const Tensor* written(const c10::FunctionSchema& schema, size_t index, const Arguments& arguments) {
  const auto* alias = schema.returns()[index].alias_info();
  if (!alias || !alias->isWrite()) return nullptr;
  for (size_t i = 0; i < arguments.originals.size(); ++i) {
    const auto* own = schema.arguments()[i].alias_info();
    if (arguments.originals[i].defined() && own && own->isWrite() && own->beforeSets() == alias->beforeSets())
      return &arguments.originals[i];
  }
  return nullptr;
}

// Products of three-dimensional convolutions whose groups are their channels have a kernel for CUDA alone.
bool by_channel(const std::string& name, Stack& stack) {
  if (name != "aten::conv_depthwise3d") return false;
  auto given = torch::jit::last(stack, 7);
  const auto x = given[0].toTensor();
  auto out = at::conv3d(
      x, given[1].toTensor(), given[3].toOptional<Tensor>(), given[4].toIntVector(), given[5].toIntVector(),
      given[6].toIntVector(), x.size(1));
  torch::jit::drop(stack, 7);
  torch::jit::push(stack, out);
  return true;
}

void call(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.operator_name().name;
  const bool indexes = INDEXING.count(name) > 0;
  Arguments arguments(schema, *stack);
  TORCH_CHECK(
      indexes || FOR_TWO_DEVICES.count(name) || !(arguments.on_gpu && arguments.on_cpu),
      name, ": Expected all tensors to be on the same device, but found cuda:0 and cpu");
  if (SIZES_FROM_VALUES.count(name) || (indexes && (arguments.by_mask || arguments.on_cpu))) wait(name);
  if (name == "aten::repeat_interleave" && schema.operator_name().overload_name == "Tensor" &&
      torch::jit::peek(*stack, 1, 2).isNone())
    wait(name);
  if (!by_channel(name, *stack)) op.callBoxed(stack);
  const auto first = stack->size() - schema.returns().size();
  for (size_t index = 0; index < schema.returns().size(); ++index) {
    auto& value = (*stack)[first + index];
    if (const auto* own = value.isTensor() ? written(schema, index, arguments) : nullptr) {
      follow(*own, value.toTensor());
      value = *own;
    } else if (arguments.to_cpu) {
      continue;
    } else if (value.isTensor()) {
      value = to_gpu(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(to_gpu(tensor));
      value = list;
    }
  }
}

Tensor& copy(Tensor& self, const Tensor& from, bool non_blocking) {
  if (on_gpu(self) == on_gpu(from)) {
    to_host(self).copy_(to_host(from));
  } else if (!non_blocking) {
    wait("aten::copy_");
    to_host(self).copy_(to_host(from));
  } else if (on_gpu(self)) {
    to_host(self).copy_(from);
  } else {
    // Until somebody waits, what lies there is anything.
    self.fill_(self.is_floating_point() ? at::Scalar(std::numeric_limits<double>::quiet_NaN()) : at::Scalar(77));
    std::lock_guard<std::mutex> guard(lock);
    under_way.emplace_back(self, to_host(from).expand_as(self).clone());
  }
  return self;
}

Tensor& set_part(Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(size, stride.empty() && size.size() == 1 ? at::IntArrayRef({1}) : stride, offset);
  return self;
}

Tensor& set_whole(Tensor& self, at::Storage storage) {
  const int64_t count = storage.nbytes() / self.element_size();
  return set_part(self, std::move(storage), 0, {count}, {1});
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&call>());
}

// Those that have one implementation for all devices, which asks for a kernel of its own where it gets to CUDA.
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  for (const char* name :
       {"_local_scalar_dense", "resize_", "convolution", "convolution_backward", "_convolution"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&call>());
  library.impl("copy_", &copy);
  library.impl("set_.source_Storage", &set_whole);
  library.impl("set_.source_Storage_storage_offset", &set_part);
}

}  // namespace

extern "C" {
void stand_in_install() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new Guard());
}
void stand_in_arrive() { arrive(); }
void stand_in_set_mode(int value) { mode = static_cast<Waits>(value); }
int stand_in_mode() { return static_cast<int>(mode); }
}
