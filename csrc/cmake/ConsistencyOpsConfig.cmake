# find_package(ConsistencyOps) with CMAKE_PREFIX_PATH = consistency_ops.cmake_prefix_path() of the Python package, which
# ships the sources: the library is compiled with the caller's compiler, as part of the caller's project.
if(NOT TARGET ConsistencyOps::consistency_ops)
  add_subdirectory("${CMAKE_CURRENT_LIST_DIR}/.." "${CMAKE_BINARY_DIR}/consistency_ops" EXCLUDE_FROM_ALL)
endif()
