// Registers the schemas of schemas.inc.
#include <sstream>
#include <string>

#include "bindings/registration.h"

CO_LIBRARY(CO_NAMESPACE, m) {
  std::istringstream lines(
#include "bindings/schemas.inc"
  );
  std::string line, schema;
  const auto define = [&] {
    if (!schema.empty()) m.def(schema.c_str());
    schema.clear();
  };
  while (std::getline(lines, line)) {
    if (line.empty()) define();
    if (line.rfind("//", 0) != 0) schema += line;
  }
  define();
}
