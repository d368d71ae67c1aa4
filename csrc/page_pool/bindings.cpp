// fastattn._page_pool: PagePool as Python sees it. Documentation and messages are those of fastattn/page_pool.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "page_pool.hpp"

namespace py = pybind11;
using namespace fastattn;

namespace {

[[noreturn]] void reject(const std::string& where, const char* name, const char* must, py::handle got) {
  const auto kind = py::type::handle_of(got).attr("__name__").cast<std::string>();
  throw py::type_error(where + ": " + name + " must be " + must + ", got " + kind);
}

// An expected error of Python's is cleared; any other goes on to the caller.
void clear_if(PyObject* expected) {
  if (!PyErr_ExceptionMatches(expected)) throw py::error_already_set();
  PyErr_Clear();
}

bool has(py::handle value, const char* name) {
  if (py::reinterpret_steal<py::object>(PyObject_GetAttrString(value.ptr(), name))) return true;
  clear_if(PyExc_AttributeError);
  return false;
}

// Arrays and tensors of one element have __index__ too, and are no ints.
bool is_integer(py::handle value) { return PyLong_Check(value.ptr()) || (PyIndex_Check(value.ptr()) && !has(value, "__len__")); }

int64_t as_int64(const std::string& where, const char* name, py::handle index) {
  const int64_t value = PyLong_AsLongLong(index.ptr());
  if (value == -1 && PyErr_Occurred()) {
    clear_if(PyExc_OverflowError);
    throw std::invalid_argument(where + ": " + name + " must fit 64 bits");
  }
  return value;
}

int64_t integer(const std::string& where, const char* name, py::handle value) {
  if (!is_integer(value)) reject(where, name, "an int", value);
  auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) throw py::error_already_set();
  return as_int64(where, name, index);
}

// 1-D integers: int64 buffers are read where they lie, everything else is copied.
class Integers {
 public:
  Integers(const std::string& where, const char* name, const py::object& values) {
    if (!borrow(values)) copy(where, name, values);
  }

  Integers(int64_t value, int64_t repeats) : copied_(repeats, value) {}

  Ints view() const {
    if (buffer_) return {static_cast<const int64_t*>(buffer_->ptr), static_cast<int64_t>(buffer_->size)};
    return {copied_.data(), static_cast<int64_t>(copied_.size())};
  }

 private:
  bool borrow(const py::object& values) {
    if (!PyObject_CheckBuffer(values.ptr())) return false;
    try {
      buffer_ = py::buffer(values).request();
    } catch (const py::error_already_set& error) {  // it has none to give
      if (!error.matches(PyExc_Exception)) throw;
      return false;
    }
    if (buffer_->ndim == 1 && buffer_->itemsize == 8 && buffer_->strides[0] == 8 && (buffer_->format == "l" || buffer_->format == "q"))
      return true;
    buffer_.reset();
    return false;
  }

  void copy(const std::string& where, const char* name, const py::object& values) {
    const auto reject_if_type_error = [&] {
      clear_if(PyExc_TypeError);
      reject(where, name, "1-D ints", values);
    };
    py::object list = has(values, "tolist") ? values.attr("tolist")() : values;
    auto iterator = py::reinterpret_steal<py::object>(PyObject_GetIter(list.ptr()));
    if (!iterator) reject_if_type_error();
    const auto items = py::reinterpret_steal<py::list>(PySequence_List(iterator.ptr()));
    if (!items) throw py::error_already_set();
    for (py::handle item : items) {
      auto index = py::reinterpret_steal<py::object>(PyNumber_Index(item.ptr()));
      if (!index) reject_if_type_error();
      copied_.push_back(as_int64(where, name, index));
    }
  }

  std::optional<py::buffer_info> buffer_;
  std::vector<int64_t> copied_;
};

Integers counts_of(const PagePool& pool, const char* where, const py::object& added, int64_t batch) {
  if (!is_integer(added)) return Integers(where, "new", added);
  const int64_t count = integer(where, "new", added);
  pool.check_count(where, count);  // of no sequence at all, too
  return Integers(count, batch);
}

PoolStep py_step(PagePool& pool, const py::object& ids, const py::object& counts, const py::object& tokens) {
  const char* where = "PagePool.step";
  const Integers id_values(where, "ids", ids);
  const Integers count_values = counts_of(pool, where, counts, id_values.view().size);
  if (tokens.is_none()) return pool.step(id_values.view(), count_values.view(), nullptr);
  const Integers token_values(where, "tokens", tokens);
  const Ints view = token_values.view();
  return pool.step(id_values.view(), count_values.view(), &view);
}

Copies py_extend(PagePool& pool, const py::object& id, const py::object& added) {
  const char* where = "PagePool.extend";
  if (is_integer(added)) {
    const int64_t count = integer(where, "new", added);
    return pool.extend(integer(where, "id", id), count, nullptr);
  }
  const Integers tokens(where, "new", added);
  return pool.extend(integer(where, "id", id), tokens.view().size, tokens.view().data);
}

int64_t py_allocate(PagePool& pool, const py::object& tokens) {
  return tokens.is_none() ? pool.allocate({}) : pool.allocate(Integers("PagePool.allocate", "tokens", tokens).view());
}

void py_truncate(PagePool& pool, const py::object& id, const py::object& length) {
  const int64_t kept = integer("PagePool.truncate", "length", length);
  pool.truncate(integer("PagePool.truncate", "id", id), kept);
}

py::object num_changes(const PoolStep& step) {
  if (step.num_changes == PagePool::kUncounted) return py::none();
  return py::int_(step.num_changes);
}

py::buffer_info buffer_of(Array& array) {
  std::vector<py::ssize_t> shape(array.shape.begin(), array.shape.end());
  auto strides = py::detail::c_strides(shape, sizeof(int32_t));
  return py::buffer_info(array.values.data(), std::move(shape), std::move(strides));
}

}  // namespace

PYBIND11_MODULE(_page_pool, module) {
  module.doc() = "The page pool in C++; fastattn.page_pool says what it does.";
  py::register_exception<OutOfPages>(module, "OutOfPages", PyExc_RuntimeError)
      .doc() = "There are fewer free pages than a call needs; it has changed nothing.";

  py::class_<Array, ArrayPtr>(module, "Array", py::buffer_protocol(), "int32, for numpy.asarray and torch.frombuffer.")
      .def_property_readonly("shape", [](const Array& array) { return py::tuple(py::cast(array.shape)); })
      .def_buffer(&buffer_of);

  py::class_<PoolStep>(module, "PoolStep", "See fastattn.page_pool.PoolStep.")
      .def_readonly("number", &PoolStep::number)
      .def_readonly("batch", &PoolStep::batch)
      .def_readonly("total_q", &PoolStep::total_q)
      .def_readonly("max_seqlen_q", &PoolStep::max_seqlen_q)
      .def_property_readonly("num_changes", &num_changes)
      .def_readonly("copies", &PoolStep::copies);

  py::class_<PagePool>(module, "PagePool", "See fastattn.page_pool.PythonPagePool, which documents this interface.")
      .def(py::init([](const py::object& num_pages, const py::object& page_size, bool share_prefixes) {
             const int64_t pages = integer("PagePool", "num_pages", num_pages);
             return std::make_unique<PagePool>(pages, integer("PagePool", "page_size", page_size), share_prefixes);
           }),
           py::arg("num_pages"), py::arg("page_size"), py::kw_only(), py::arg("share_prefixes") = true)
      .def_property_readonly("num_pages", &PagePool::num_pages)
      .def_property_readonly("page_size", &PagePool::page_size)
      .def_property_readonly("num_sequences", &PagePool::num_sequences)
      .def_property_readonly("num_free", &PagePool::num_free)
      .def_readonly("page_table", &PagePool::page_table)
      .def_readonly("cache_seqlens", &PagePool::cache_seqlens)
      .def_readonly("seqlens_k", &PagePool::seqlens_k)
      .def_readonly("cu_seqlens_q", &PagePool::cu_seqlens_q)
      .def_readonly("slots", &PagePool::slots)
      .def_readonly("positions", &PagePool::positions)
      .def_readonly("changes", &PagePool::changes)
      .def("allocate", &py_allocate, py::arg("tokens") = py::none())
      .def("length", [](PagePool& pool, py::object id) { return pool.length(integer("PagePool.length", "id", id)); }, py::arg("id"))
      .def("pages", [](PagePool& pool, py::object id) { return pool.pages(integer("PagePool.pages", "id", id)); }, py::arg("id"))
      .def("extend", &py_extend, py::arg("id"), py::arg("new"))
      .def("free", [](PagePool& pool, py::object id) { pool.free(integer("PagePool.free", "id", id)); }, py::arg("id"))
      .def("fork", [](PagePool& pool, py::object id) { return pool.fork(integer("PagePool.fork", "id", id)); }, py::arg("id"))
      .def("truncate", &py_truncate, py::arg("id"), py::arg("length"))
      .def("commit", &PagePool::commit)
      .def("abandon", &PagePool::abandon)
      .def("step", &py_step, py::arg("ids"), py::arg("new") = 1, py::arg("tokens") = py::none());
}
