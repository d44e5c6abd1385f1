// Who builds the library, and so what its module and the namespace of its operators are called.
//
// setup.py says everything by itself: torch defines TORCH_EXTENSION_NAME (_C), setup.py USE_CUDA and the architectures.
// The builder of the Hugging Face Hub (CO_HUB, build.toml) gives the module of every build a name of its own, which is
// that of its operators too, and says by CUDA_KERNEL that the CUDA kernels are in it.
#pragma once

#if !defined(TORCH_EXTENSION_NAME)
#define TORCH_EXTENSION_NAME _C
#endif

#if defined(CO_HUB) && defined(CUDA_KERNEL)
#if !defined(USE_CUDA)
#define USE_CUDA
#endif
#define CONSISTENCY_OPS_CUDA_ARCHS "8.0;9.0a;10.0;12.0"  // build.toml's
#endif

#if defined(CONSISTENCY_OPS_SIMT)  // tests/simt: the CUDA kernels on the host, beside the library's own operators
#define CO_NAMESPACE consistency_ops_simt
#elif defined(CO_HUB)
#define CO_NAMESPACE TORCH_EXTENSION_NAME
#else
#define CO_NAMESPACE consistency_ops
#endif
