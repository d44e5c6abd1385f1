# find_package(ConsistencyOps) with CMAKE_PREFIX_PATH = consistency_ops.cmake_prefix_path() of the Python package, which
# ships the sources: the library is compiled with the caller's compiler, for the caller's CUDA toolkit, as part of the
# caller's project.  Sets
#   ConsistencyOps::consistency_ops  target; needs no torch and no Python
#   ConsistencyOps_CUDA              whether it has the CUDA launchers
#   ConsistencyOps_TORCH_LIBRARY     the package's own library, which registers the operators with LibTorch; or empty
if(NOT TARGET ConsistencyOps::consistency_ops)
  add_subdirectory("${CMAKE_CURRENT_LIST_DIR}/.." "${CMAKE_BINARY_DIR}/consistency_ops" EXCLUDE_FROM_ALL)
endif()
include("${CMAKE_CURRENT_LIST_DIR}/ConsistencyOpsCuda.cmake")

set(ConsistencyOps_TORCH_LIBRARY "")
foreach(package "${CMAKE_CURRENT_LIST_DIR}/../.." "${CMAKE_CURRENT_LIST_DIR}/../../consistency_ops")
  if(EXISTS "${package}/_C.abi3.so")
    get_filename_component(ConsistencyOps_TORCH_LIBRARY "${package}/_C.abi3.so" REALPATH)
  endif()
endforeach()
