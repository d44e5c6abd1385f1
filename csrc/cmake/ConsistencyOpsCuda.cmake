# ConsistencyOps_CUDA: whether the target has the CUDA launchers.
get_target_property(definitions ConsistencyOps::consistency_ops INTERFACE_COMPILE_DEFINITIONS)
set(ConsistencyOps_CUDA OFF)
if("CONSISTENCY_OPS_CUDA" IN_LIST definitions)
  set(ConsistencyOps_CUDA ON)
endif()
