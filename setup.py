from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="paratrain",
    version="0.1.0",
    description="Distributed training of any PyTorch module: one override picks the layout, and the loss does not change",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["paratrain", "paratrain.*"]), "paratrain.conf"],
    package_dir={"paratrain": "paratrain", "paratrain.conf": "conf"},  # the top-level conf/ is paratrain.conf
    package_data={"paratrain.conf": ["*.yaml", "**/*.yaml"]},
    include_package_data=False,
    install_requires=[
        "torch>=2.11",
        "hydra-core>=1.3.2,<1.4",  # 1.4 changes which override wins
        "numpy",
        "safetensors",
        "tokenizers",
        "xxhash",
        "rich",
        "cloudpickle",
        "wandb",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19.8"],  # managed_gradient_accumulation
        "fairscale": ["fairscale>=0.4.13"],
        "hf": ["datasets>=4", "transformers>=4.53", "pyarrow", "peft"],  # data sets without code
        "optim": ["pytorch-optimizer"],
        "fp8": ["torchao"],
        "remote": ["fsspec"],
        "tensorboard": ["tensorboard"],
        "bench": ["accelerate", "lightning"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "setuptools",
            "ruff",
            "mypy",
            "matplotlib",
            "scikit-learn",
            "tensorboard",
            "datasets",
            "transformers",
            "peft",
            "pytorch-optimizer",
            "torchao",
            "pyarrow",
            "s3fs",
            "moto[server]",
        ],
    },
    entry_points={"console_scripts": ["paratrain=paratrain.__main__:main"]},
)
