# The extension jaxkv._cuda, built where there is nvcc and without which everything else works. It needs no driver
# to be built or imported: cudart is part of it and looks for libcuda when a device is first used.
string(TOLOWER "${JAXKV_CUDA}" JAXKV_CUDA)
if(NOT JAXKV_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "JAXKV_CUDA is \"${JAXKV_CUDA}\"; use on, off or auto")
endif()
if(JAXKV_CUDA STREQUAL "off")
  return()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(JAXKV_CUDA STREQUAL "on")
    message(FATAL_ERROR "JAXKV_CUDA is on, but there is no nvcc; put it on PATH, or set CUDACXX to it")
  endif()
  message(STATUS "no nvcc: jaxkv is built without its CUDA extension")
  return()
endif()

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  # Machine code for the oldest of each family, and PTX for whatever comes after.
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known)
  if(known MATCHES "compute_100")
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
  endif()
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1)
  message(FATAL_ERROR "nvcc is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}, but kernels take more parameters than it allows; "
          "use CUDA 12.1 or newer, or -DJAXKV_CUDA=off")
endif()
find_package(CUDAToolkit REQUIRED)

add_library(jaxkv_cuda_kernels STATIC cuda/kernels.cu)
target_compile_options(jaxkv_cuda_kernels PRIVATE
  -O3 --expt-relaxed-constexpr -Werror=all-warnings -Xptxas=-warn-spills,-warn-lmem-usage,-Werror
  -Xcompiler=-Wall,-Wextra,-Werror)
target_link_libraries(jaxkv_cuda_kernels PRIVATE jaxkv_cuda_core)

nanobind_add_module(_cuda NOMINSIZE
  cuda/module.cc cuda/cuda_runtime.cc cuda/devices.cc cuda/handlers.cc op_arguments.cc)
target_include_directories(_cuda SYSTEM PRIVATE "${JAXLIB_DIR}/include")
target_link_libraries(_cuda PRIVATE jaxkv_cuda_kernels jaxkv_cuda_core CUDA::cudart_static)
install(TARGETS _cuda LIBRARY DESTINATION jaxkv)
