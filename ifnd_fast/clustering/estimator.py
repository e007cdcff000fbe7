"""scikit-learn's conventions of an estimator, without its import, which takes longer than many a clustering."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import Tensor

from ifnd_fast.ops import checks

if TYPE_CHECKING:
    from sklearn.utils import Tags

Self = TypeVar("Self", bound="Estimator")


class Estimator:
    """Parameters are the constructor's arguments, kept as they were given; so clone, Pipeline and searches work.

    Those of scikit-learn's own classes that would do it (BaseEstimator, ClusterMixin, TransformerMixin) are asked for
    only by who has imported scikit-learn anyway.
    """

    @classmethod
    def _parameters(cls) -> list[str]:
        return [name for name in inspect.signature(cls).parameters]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name. deep: for scikit-learn; there are no estimators within this one."""
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self: Self, **parameters: Any) -> Self:
        """Change some parameters; `fit` checks them.

        Raises:
            ValueError: a name is none of a parameter.
        """
        for name, value in parameters.items():
            if name not in self._parameters():
                raise ValueError(
                    f"{type(self).__name__} has no parameter {name!r}, only {', '.join(self._parameters())}"
                )
            setattr(self, name, value)
        return self

    def set_output(self: Self, *, transform: str | None = None) -> Self:
        """What `transform` gives of arrays and data frames: "default" (arrays), or data frames of "pandas" or "polars".
        None: what it gives now. Of tensors it gives tensors."""
        if transform is not None:
            checks.choice("transform", transform, ("default", "pandas", "polars"))
            self._sklearn_output_config = {"transform": transform}  # by this name `clone` takes it along
        return self

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of `transform`'s columns."""
        raise NotImplementedError

    def _contained(self, found: Any, x: Any) -> Any:
        """What `transform` found of x, in the container that `set_output` or scikit-learn's set_config asks for."""
        own = getattr(self, "_sklearn_output_config", {})
        if isinstance(x, Tensor) or not (own or "sklearn" in sys.modules):
            return found
        from sklearn.base import TransformerMixin

        names = self.get_feature_names_out

        class Transformed(TransformerMixin):
            def transform(self, X: Any) -> Any:
                return found

            def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
                return names()

        return Transformed().set_output(**own).transform(x)

    def __repr__(self) -> str:
        defaults = {name: given.default for name, given in inspect.signature(type(self)).parameters.items()}
        told = ", ".join(
            f"{name}={np.array2string(np.asarray(value), threshold=6) if hasattr(value, 'shape') else repr(value)}"
            for name, value in self.get_params().items()
            if hasattr(value, "shape") or value != defaults[name]
        )
        return f"{type(self).__name__}({told})"

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_features_in_")

    def __sklearn_tags__(self) -> Tags:
        """A clusterer and a transformer, of dense rows."""
        from sklearn.utils import Tags, TargetTags, TransformerTags

        return Tags("clusterer", TargetTags(required=False), TransformerTags(["float64", "float32"]))

    def _not_fitted(self) -> Exception:
        from sklearn.exceptions import NotFittedError

        return NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit first")

    def _fit_columns(self, x: Any, n: int) -> None:
        """Remember the number and, of a data frame, the names of the columns."""
        vars(self).pop("feature_names_in_", None)
        self.n_features_in_ = n
        if hasattr(x, "columns"):
            _by_scikit_learn(self, x, reset=True)

    def _check_columns(self, x: Any, n: int, fitted: int) -> None:
        """Raises ValueError for others than the `fitted` columns."""
        if hasattr(x, "columns") or (hasattr(self, "feature_names_in_") and not isinstance(x, Tensor)):
            _by_scikit_learn(self, x, reset=False)
        if n != fitted:
            raise ValueError(f"X has {n} features, but {type(self).__name__} is expecting {fitted} features as input")


def _by_scikit_learn(estimator: Estimator, x: Any, reset: bool) -> None:
    """Names of columns by its own rules, and in its own words."""
    from sklearn.utils.validation import validate_data

    validate_data(estimator, x, reset=reset, skip_check_array=True)
