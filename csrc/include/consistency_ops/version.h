// The version of the library; tests compare it with consistency_ops.__version__.
#pragma once

#define CONSISTENCY_OPS_VERSION_MAJOR 0
#define CONSISTENCY_OPS_VERSION_MINOR 1
#define CONSISTENCY_OPS_VERSION_PATCH 0
